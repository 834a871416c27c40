"""The small examples at tiny sizes."""

import quickstart


def test_quickstart_has_a_loss_that_falls_and_a_line_for_each_block(capsys):
    history = quickstart.main(["--epochs=4"])
    assert history[-1] < 0.8 * history[0]
    printed = capsys.readouterr().out
    blocks = ["EMAWrapper", "ClassQueue", "SupConDistillLoss", "ResponseDistillLoss", "HardSampleFusionLoss"]
    assert all(f"\n{block}" in printed for block in [*blocks, "MomentumFusionFactors"])
