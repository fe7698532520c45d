"""Draw the pictures of docs/concepts.md: ``python docs/pictures/draw.py`` writes the SVG files beside this script."""

from __future__ import annotations

from html import escape
from pathlib import Path

CELL = 34
INK, PALE, PAPER, ACCENT = "#263238", "#90a4ae", "#ffffff", "#c62828"
COLOURS = ("#bbdefb", "#ffe0b2", "#c8e6c9", "#e1bee7")


class Picture:
    """A white sheet with boxes, texts and arrows; ``str()`` is the SVG."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height = width, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="10" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, text: str = "", fill: str = PAPER, width: float = CELL, height: float = CELL,
            bold: bool = False, stroke: str = INK) -> None:  # fmt: skip
        """A rectangle with a centred text."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="{2.5 if stroke == ACCENT else 1}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, text, bold=bold)

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "middle", bold: bool = False,
             colour: str = INK) -> None:  # fmt: skip
        """One line of text with its baseline at ``y``."""
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> None:
        """An arrow; dashed ones are maps rather than data flow."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}"{dash} marker-end="url(#tip)"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = PALE) -> None:
        """A thin line without a tip."""
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def draw_map(picture: Picture, x: float, y: float, title: str, note: str, phi: tuple[int, ...]) -> None:
    """Student channels above, teacher channels below, one line from each teacher channel to its student channel."""
    width = len(phi) * CELL
    students = max(phi) + 1
    start = x + (width - students * CELL) / 2
    picture.text(x + width / 2, y, title, bold=True)
    picture.text(x + width / 2, y + 20, note, size=12, colour="#546e7a")
    for index in range(students):
        picture.box(start + index * CELL, y + 36, str(index), COLOURS[index])
    for index, source in enumerate(phi):
        picture.line(x + (index + 0.5) * CELL, y + 130, start + (source + 0.5) * CELL, y + 36 + CELL)
        picture.box(x + index * CELL, y + 130, str(index), COLOURS[source])
    picture.text(x + width / 2, y + 188, f"phi = [{' '.join(map(str, phi))}]", size=13)


def replica_maps() -> Picture:
    """Three maps: the default layout, a concatenation with a narrow value, and the default after a shuffle."""
    picture = Picture(860, 250, "Replica maps: every teacher channel points to the student channel that it copies")
    draw_map(picture, 70, 34, "output of a layer, ratio 2", "replicas side by side", (0, 0, 1, 1, 2, 2))
    draw_map(picture, 335, 34, "cat(a, x)", "a: 2 channels, widened; x: 1, narrow", (0, 0, 1, 1, 2))
    draw_map(
        picture, 565, 34, "after a shuffle in 2 groups", "the layout follows the operator", (0, 1, 0, 1, 2, 3, 2, 3)
    )
    picture.text(20, 87, "student", size=12, anchor="start", colour="#546e7a")
    picture.text(20, 187, "teacher", size=12, anchor="start", colour="#546e7a")
    return picture


STAGES = (("x", 3, 3), ("conv", 4, 8), ("batch norm", 4, 8), ("ReLU", 4, 8), ("linear", 10, 10))


def two_worlds() -> Picture:
    """The same graph in the student's world and the teacher's, with the map of every value between them."""
    picture = Picture(860, 300, "Two worlds in lock step: student above, teacher below, one map per value")
    picture.text(24, 72, "student", bold=True, anchor="start")
    picture.text(24, 232, "teacher", bold=True, anchor="start")
    for index, (name, narrow, wide) in enumerate(STAGES):
        x = 120 + index * 150
        for y, width in ((40, narrow), (200, wide)):
            picture.box(x, y, name, COLOURS[0] if y == 40 else COLOURS[1], width=104, height=50, bold=True)
            picture.text(x + 52, y + 68 if y == 200 else y - 8, f"{width} channels", size=12)
            if index:
                picture.arrow(x - 46, y + 25, x - 2, y + 25)
        if narrow != wide:
            picture.arrow(x + 52, 200, x + 52, 94, dashed=True)
            picture.text(x + 60, 140, "phi =", size=12, anchor="start")
            picture.text(x + 60, 156, "[00112233]", size=12, anchor="start")
        else:
            picture.arrow(x + 52, 200, x + 52, 94, dashed=True)
            picture.text(x + 60, 148, "equal", size=12, anchor="start")
    picture.text(430, 292, "at every node:  teacher_value == student_value.index_select(1, phi)", size=13)
    return picture


STUDENT_WEIGHT = (("a", "b"), ("c", "d"))
NOISE = (("e", "f"), ("g", "h"))


def teacher_entry(row: int, column: int) -> str:
    """Entry of the 4 x 4 teacher weight: half the student's, with opposite noise on the rows of the second replica."""
    value = STUDENT_WEIGHT[row // 2][column // 2] + "/2"
    if row % 2 == 0:
        return value
    return value + ("+" if column % 2 == 0 else "−") + NOISE[row // 2][column // 2]


def expand_extract() -> Picture:
    """A 2 x 2 weight, its teacher at ratio 2, and the entries that extract reads back."""
    picture = Picture(860, 320, "expand and extract on the weight of one hidden layer at ratio 2")
    cell, wide = 50, 74
    picture.text(100, 40, "student weight", bold=True)
    for row in range(2):
        for column in range(2):
            fill = COLOURS[row * 2 + column]
            picture.box(50 + column * cell, 110 + row * cell, STUDENT_WEIGHT[row][column], fill, cell, cell, bold=True)
            picture.box(710 + column * cell, 110 + row * cell, STUDENT_WEIGHT[row][column], fill, cell, cell, bold=True)
    picture.text(430, 40, "teacher weight", bold=True)
    for row in range(4):
        for column in range(4):
            kept = row % 2 == 0 and column % 2 == 0
            fill, stroke = COLOURS[row // 2 * 2 + column // 2], ACCENT if kept else INK
            x, y = 284 + column * (wide - 1), 64 + row * cell
            picture.box(x, y, teacher_entry(row, column), fill, wide - 5, cell - 4, bold=kept, stroke=stroke)
    picture.text(760, 40, "student again", bold=True)
    picture.arrow(160, 160, 276, 160)
    picture.text(218, 150, "expand", bold=True)
    picture.arrow(582, 160, 700, 160)
    picture.text(641, 150, "extract", bold=True)
    picture.text(641, 180, "framed entries x 2", size=12)
    picture.text(
        430, 290, "Each row adds up over the replicas of an input to the student's entry: the noise cancels,", size=13
    )
    picture.text(430, 309, "and the framed entries carry none, so both directions are exact.", size=13)
    return picture


def shared_parameters() -> Picture:
    """One set of parameters, two networks that compute with it."""
    picture = Picture(860, 250, "Teacher and student view compute with the same parameters")
    picture.box(40, 95, "batch x", width=110, height=50, bold=True)
    picture.box(300, 30, "teacher(x)", COLOURS[1], 190, 50, bold=True)
    picture.box(300, 160, "view(x)", COLOURS[0], 190, 50, bold=True)
    picture.arrow(150, 110, 296, 58)
    picture.arrow(150, 130, 296, 182)
    picture.box(630, 95, "teacher's parameters", COLOURS[2], 190, 50, bold=True)
    picture.arrow(630, 108, 494, 58)
    picture.arrow(630, 132, 494, 182)
    picture.text(560, 68, "as they are", size=12, anchor="start")
    picture.text(560, 184, "narrowed", size=12, anchor="start")
    picture.arrow(395, 80, 395, 156, dashed=True)
    picture.text(405, 124, "soft targets (detached)", size=12, anchor="start")
    picture.text(430, 238, "gradients of both losses flow back along the solid arrows into the same tensors", size=13)
    return picture


PICTURES = {
    "replica-maps": replica_maps,
    "two-worlds": two_worlds,
    "expand-extract": expand_extract,
    "shared-parameters": shared_parameters,
}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
