"""Training a compact network together with its dynamic teacher: losses, methods, data, trainer, command line.

Everything above the graph passes: this package uses only the public names of ``reparam`` (``expand``,
``student_view``, ``extract``, ``save``). Needs the extra ``train`` (timm, torchvision, scikit-learn, tqdm).
"""
