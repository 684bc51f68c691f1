"""What a user sees where output goes to a file."""

from train.progress import Progress, show


def test_each_report_is_a_line_with_the_time_left(capsys):
    with Progress(0, 4) as progress:
        progress.update(0, eval_loss=2.0)
        progress.update(1, loss=1.5, tokens_per_second=1200.0)
        progress.update(4, loss=1.25, tokens_per_second=1300.0)
    first, second, last = capsys.readouterr().out.strip().splitlines()
    assert first == "step 0/4  eval 2.0000"
    assert second == "step 1/4  loss 1.5000  1,200 tokens/s"
    assert last == "step 4/4  loss 1.2500  1,300 tokens/s  0 s left"


def test_a_summary_is_a_table(capsys):
    show({"trainable_share": 0.01, "steps": 1000, "eval_loss_best": None}, "done")
    text = capsys.readouterr().out
    assert "done" in text
    assert all(part in text for part in ("trainable share", "1%", "1,000", "-"))
