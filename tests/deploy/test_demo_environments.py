"""`make demo-environments` as it is run, with less calm; and the picture that it draws."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from deploy.demo_environments_chart import WIDTH, Chart, Moment, Shade

SVG = "{http://www.w3.org/2000/svg}"


def test_the_demo_verifies_all_that_it_shows(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="sg-") as short:  # paths of Unix sockets are short
        _verify(tmp_path, Path(short))


def _verify(tmp_path: Path, temporary: Path) -> None:
    picture = tmp_path / "out" / "picture.svg"
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.demo_environments", "--calm-s", "1", "--picture", str(picture)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=800)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # it ends what it has started
        process.communicate(timeout=60)
        raise
    assert process.returncode == 0, said[-3000:]
    assert "no caller has seen an error" in said
    assert "0 requests answered by b between its breach and its return" in said
    assert "the database of c: exactly b's key is disabled" in said
    assert f"file://{picture}" in said
    assert not list(temporary.iterdir()), "its files ended with it"
    drawn = ET.fromstring(picture.read_text())
    words = [text.text for text in drawn.iter(f"{SVG}text")]
    for expected in ("incident open", "re-keyed", "healed", "rejoined", "environment a", "environment b"):
        assert expected in words
    assert len(list(drawn.iter(f"{SVG}polyline"))) == 3


def chart(**changes: object) -> Chart:
    fields: dict[str, object] = {
        "title": "a <title> & more",
        "footer": "",
        "times_s": [0.0, 1.0, 2.0, 4.0],
        "counts": {"a": [0, 10, 20, 60], "b": [5, 5, 5, 5]},
        "colours": {"a": "#111111", "b": "#222222"},
    }
    return Chart(**(fields | changes))  # type: ignore[arg-type]


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ET.fromstring(svg).iter(f"{SVG}polyline")
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in line.attrib["points"].split())]
        for line in lines
    ]


def test_rates_are_differences_by_time_and_all_bands_have_one_scale() -> None:
    first, second = points(chart().svg())
    base = second[0][1]
    assert {y for _, y in second} == {base}, "nothing was answered"
    # 10/s, 10/s, then 40 in two seconds; the scale goes to 20/s: the whole band is 120 high.
    below_the_top = [round(y - first[-1][1], 1) for _, y in first]
    assert below_the_top == [60.0, 60.0, 0.0]
    assert [x for x, _ in first] == sorted(x for x, _ in first)
    assert all(0 < x < WIDTH for x, _ in first)


def test_texts_are_escaped_and_near_moments_stand_in_different_rows() -> None:
    moments = [Moment(1.0, "one <b>"), Moment(1.01, "two"), Moment(1.02, "three"), Moment(3.9, "four")]
    shade = Shade(name="b", begin_s=1.0, end_s=3.0, text="healing & quiet")
    drawn = ET.fromstring(chart(moments=moments, shades=[shade]).svg())
    found = {text.text: text.attrib for text in drawn.iter(f"{SVG}text")}
    assert "a <title> & more" in found
    assert "healing & quiet" in found
    rows = [found[moment.text]["y"] for moment in moments]
    assert len(set(rows[:3])) == 3
    assert rows[3] == rows[0]


def test_nothing_recorded_is_a_picture_too() -> None:
    drawn = ET.fromstring(chart(times_s=[], counts={"a": [], "b": []}).svg())
    assert not list(drawn.iter(f"{SVG}polyline"))
