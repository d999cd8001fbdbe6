import pytest

from hf_slim.evaluation.picture import draw, panels
from tests.hub.reports import report, spread


def test_every_measure_of_the_table_has_a_panel_also_those_that_got_worse():
    made = report()
    made["base"]["inference"]["prefill_ms"], made["result"]["inference"]["prefill_ms"] = spread(10), spread(20)
    made["base"]["training"]["step_ms"], made["result"]["training"]["step_ms"] = spread(10, 0.2), spread(11, 0.2)
    made["base"]["inference"]["decode_tokens_per_s"] = spread(10)
    made["result"]["inference"]["decode_tokens_per_s"] = spread(20)
    made["base"]["quality"]["perplexity"], made["result"]["quality"]["perplexity"] = 5.0, 5.1
    found = {panel.label: panel.is_worse for panel in panels(made)}
    assert len(found) == 7
    assert found["prefill"]
    assert found["held-out perplexity"]
    assert not found["decode"]
    assert not found["training step"]  # within the spread


@pytest.mark.parametrize("missing", [(), ("inference",), ("inference", "training", "quality")])
def test_a_picture_is_drawn_of_what_was_measured(missing, tmp_path):
    made = report()
    for name in missing:
        del made["result"][name]
    assert draw(made, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
