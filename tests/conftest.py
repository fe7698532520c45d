"""How the tests share the machine: one process per core, one thread in each of them."""

from __future__ import annotations

import collections
import os

import pytest

MEMORY = 3 * 2**30
"""What one process of tests may need, with the processes that its tests start."""

# Before anything imports torch, and inherited by the processes that tests start. The tensors of tests are small: a
# second thread gives next to nothing, and where others want its core too, threads spin while they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# glibc hands the memory of large tensors back to the system and gets it anew, page by page, for the next one. A process
# reads these when it starts: they are for the processes of ``-n auto`` and those that tests start.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**32))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**34))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for ``-n auto``; none where files are named, since starting them takes longer than most files."""
    if config.args_source is pytest.Config.ArgsSource.ARGS and any(".py" in name for name in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else cores * MEMORY
    return max(1, min(cores, memory // MEMORY))


ONE_IN = {
    "test_attention.py::test_each_ingredient": 4,
    "test_attention.py::test_what_the_keyword_widens": 2,
    "test_branches.py::test_branches_with_norms_in_train_mode": 2,
    "test_branches.py::test_round_trip": 2,
    "test_branches.py::test_the_function_of_student_and_teacher": 2,
    "test_branches.py::test_whole_networks": 3,
    "test_chain.py::test_stop_in_either_stage_and_go_on": 2,
    "test_distill_models.py::test_expansion_is_exact": 2,
    "test_distill_recipes.py::test_a_dumped_recipe_reads_back": 4,
    "test_distill_train.py::test_default_network_learns_the_digits": 2,
    "test_distributed.py::test_two_processes_equal_one": 2,
    "test_engine.py::test_a_run_leaves_its_static_teacher_alone": 2,
    "test_engine.py::test_bf16_learns_and_keeps_float32_weights": 3,
    "test_engine.py::test_every_loss_has_a_finite_gradient_in_learners_only": 2,
    "test_engine.py::test_gradient_of_a_step_is_that_of_the_formula": 2,
    "test_engine.py::test_loss_against_the_static_teacher_falls": 2,
    "test_exactness.py::test_another_batch_size_and_resolution": 3,
    "test_exactness.py::test_coverage": 2,
    "test_exactness.py::test_every_node": 3,
    "test_exactness.py::test_float32": 3,
    "test_exactness.py::test_ratios_of_whole_networks": 2,
    "test_exactness.py::test_the_weights_did_change": 3,
    "test_exactness.py::test_train_mode_of_whole_networks": 2,
    "test_export.py::test_timm_networks": 2,
    "test_features.py::test_student_view_and_teacher": 2,
    "test_fold_networks.py::test_networks_of_convolutions_and_norms": 2,
    "test_fold_networks.py::test_networks_with_branches": 2,
    "test_heads.py::test_the_merged_student_equals_the_heads": 2,
    "test_kdiffusion_training.py::test_a_run_ends_with_the_plain_student": 8,
    "test_kdiffusion_training.py::test_stop_in_an_epoch_and_go_on": 2,
    "test_kernels.py::test_the_law_of_padding_is_exact": 2,
    "test_methods_features.py::test_a_step": 2,
    "test_modes.py::test_compiled_teacher_and_view": 2,
    "test_modes.py::test_train_mode_is_used_and_eval_mode_comes_back": 2,
    "test_other_device.py::test_a_step": 2,
    "test_other_device.py::test_a_step_against_a_static_teacher": 3,
    "test_other_device.py::test_a_step_with_branches": 3,
    "test_parts.py::test_copies_and_files": 2,
    "test_photographs.py::test_from_scratch_and_fine_tuned": 2,
    "test_ratios.py::test_other_networks": 2,
    "test_recording.py::test_a_recorded_step_against_a_static_teacher": 2,
    "test_resume.py::test_crash_loses_the_unsaved_steps_only": 3,
    "test_resume.py::test_damaged_newest_checkpoint": 2,
    "test_resume.py::test_full_disk_at_another_file": 2,
    "test_resume.py::test_kept_checkpoints": 2,
    "test_resume.py::test_killed_between_the_last_checkpoint_and_the_other_files": 3,
    "test_resume.py::test_rollback_goes_on_with_other_data": 3,
    "test_resume.py::test_stopped_and_resumed_is_the_same_run": 2,
    "test_resume.py::test_weights_that_are_nan_are_never_saved": 2,
    "test_roundtrip.py::test_bit_equal_for_powers_of_two": 2,
    "test_roundtrip.py::test_bit_equal_for_whole_networks": 2,
    "test_rules.py::test_operator": 3,
    "test_scenarios.py::test_evaluate_gives_the_table_of_the_run": 2,
    "test_scenarios.py::test_every_method_on_folders": 2,
    "test_scenarios.py::test_precisions_run_on_the_cpu": 2,
    "test_scenarios.py::test_scenario": 2,
    "test_stages.py::test_pyramids": 3,
    "test_stages.py::test_values_are_those_of_the_network": 2,
    "test_symmetry.py::test_hidden_layers_part": 2,
    "test_symmetry.py::test_tiny_noise_is_not_enough": 2,
    "test_torch_modules.py::test_exact_and_wide": 4,
}
"""Tests with many slow cases, and the share of them that runs by default; the others run with ``-m thorough``."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what :data:`ONE_IN` leaves out, in turns: of two parameters every value of each one stays."""
    met: collections.Counter[str] = collections.Counter()
    for item in items:
        function = item.nodeid.partition("[")[0].rpartition("/")[2]
        count, number = ONE_IN.get(function), met[function]
        met[function] += item.get_closest_marker("thorough") is None
        if count is not None and number % count != number // count % count:
            item.add_marker(pytest.mark.thorough)


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without a plot of their curves, for tests of something else: drawing takes longer than a short run."""
    from reparam.distill import finish

    monkeypatch.setattr(finish, "_draw", lambda folder: None)
