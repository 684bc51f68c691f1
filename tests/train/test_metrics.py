"""What a run writes down."""

import json

from train import metrics


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with metrics.Metrics(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.log(step, loss=step / 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    with metrics.Metrics(tmp_path, 2) as log:
        log.log(3, loss=9.0, eval_loss=1.0)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0, "eval_loss": 1.0},
    ]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tensorboard_gets_the_same_figures(tmp_path):
    with metrics.Metrics(tmp_path, 0) as log:
        log.log(1, loss=0.5)
    [events] = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_no_metrics_are_no_lines(tmp_path):
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_the_plot_is_a_picture_with_or_without_evaluations(tmp_path):
    for lines in ([], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]):
        metrics.plot(lines, tmp_path / "loss.png", "a run")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
