"""The curves of a report as SVG: what they show, and that they run no code."""

import logging
from xml.etree import ElementTree

from pipelines.chain.charts import draw

SVG = "{http://www.w3.org/2000/svg}"
CURVES = {"finetune": [(1, 2.0), (2, 1.0)], "<script>": [(1, 2.5), (2, 2.0)]}


def words(svg: bytes) -> list[str]:
    """Return the texts of a drawing; what is not XML is an error."""
    return [
        text.strip()
        for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
        if (text := "".join(element.itertext()))
    ]


def test_curves_are_named_and_their_axes_labelled() -> None:
    shown = words(draw(CURVES, "loss"))
    assert {"step", "loss", "finetune", "<script>"} <= set(shown)


def test_a_single_curve_without_a_name_has_no_legend() -> None:
    svg = draw({"": [(1, 2.0), (2, 1.0)]}, "images/s")
    assert b"legend" not in svg
    assert "images/s" in words(svg)


def test_names_of_arms_are_not_markup() -> None:
    names = {element.tag for element in ElementTree.fromstring(draw(CURVES, "loss")).iter()}
    assert f"{SVG}script" not in names


def test_the_same_curves_give_the_same_bytes() -> None:
    assert draw(CURVES, "loss") == draw(CURVES, "loss")


def test_matplotlib_does_not_log_its_fonts() -> None:
    assert logging.getLogger("matplotlib").level == logging.WARNING
