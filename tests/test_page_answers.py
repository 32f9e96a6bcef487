"""report.html with the evidence of a verdict, of one run and of several: what it says is what the
evidence holds."""

import numpy as np
import pytest
from viewer_cases import (
    PASSAGES,
    PATTERNS,
    H,
    L,
    T,
    evidence,
    example,
    hover_cell,
    known,
    listed,
    settled,
    strongest,
    three_runs,
    with_losses,
)

from report.viewer import PatternSnapshot, write_viewer

pytest_plugins = ["browser"]


def cells(page, run: int) -> list[str]:
    return page.locator(f"#runs tbody tr:nth-child({run + 1}) > *").all_inner_texts()


def hints(page, run: int) -> list[str]:
    return page.eval_on_selector_all(f"#runs tbody tr:nth-child({run + 1}) > *",
                                     "cells => cells.map(cell => cell.title)")


# --- the table ------------------------------------------------------------------------------------

def test_the_table_holds_the_answers_and_numbers_of_every_run(show):
    page = show(*three_runs())
    assert cells(page, 0) == [
        "toy-s0", "partly", "only with begin token", "93% (91–95)", "31% (29–33)", "5%", "yes",
        "L1H2 L1H0", "93% / 50%", "−1% / 7%", "yes", "not shown", "210K (200K–220K)"]
    assert cells(page, 1)[:3] == ["toy-s1", "yes", "yes"]
    assert cells(page, 2) == ["one_layer-s0 (control)", "no", "no", "93% (91–95)", "31% (29–33)",
                              "5%", "no", "–", "–", "–", "not shown", "not shown", "–"]
    hint = hints(page, 0)
    assert hint[7] == "L1H2 0.90 (0.88–0.92), copies\nL1H0 0.20, neither"
    assert hint[8] == "behind the begin token: 93% (90–96)\nwithout it: 50% (40–60)"
    assert hint[9] == "behind the begin token: −1% (−4 to 2)\nwithout it: 7%"
    assert hint[10] == "17: 91% (90–92), trained periods: 99%"
    assert page.inner_text("#summary") == "Yes: induction heads do it."
    detail = page.inner_text("#detail")
    for part in ("first copy 5.10 nats (5.0–5.2)", "second 0.30 nats", "17: 91% (90–92)",
                 "tokens never repeated in training: 40% (38–42)", "+0.50 nats", "step 1,000"):
        assert part in detail, part
    assert not page.locator("#alarm").is_visible()
    assert page.title() == "toy-s0, toy-s1, one_layer-s0"


def test_a_failing_control_is_seen_at_once(show):
    page = show(*three_runs("only without begin token"))
    assert page.inner_text("#alarm").startswith("A control fails: one_layer-s0 cannot form")
    assert [cells(page, run)[1] for run in range(3)] == ["not shown", "not shown", "control fails"]
    assert "by itself: partly" in hints(page, 0)[1]
    assert page.inner_text("#summary").startswith("Not shown, because a control fails.")
    colour = "row => getComputedStyle(row.lastChild).color"
    colours = [page.eval_on_selector(f"#run-{run}", colour) for run in range(3)]
    assert colours[0] == colours[1] != colours[2]


def test_one_run_has_a_table_of_one_row_that_is_no_choice(show):
    page = show(example(evidence=evidence()))
    assert page.locator("#runs tbody tr").count() == 1
    assert not page.locator("#runs [tabindex]").count()
    assert cells(page, 0)[1] == "partly"
    assert not page.locator("#plots [class^=condition]").count()    # nothing to compare with


def test_without_evidence_it_is_the_page_of_patterns_only(show):
    page = show(example())
    assert not page.locator("#answers, #how, #pointed").filter(visible=True).count()
    titles = page.locator("#plots text").all_text_contents()
    assert "prefix matching" in titles and not any("each run" in title for title in titles)


def test_runs_that_nobody_examined_can_be_compared(show):
    page = show(*(view._replace(evidence=None) for view in three_runs()))
    assert cells(page, 0)[:3] == ["toy-s0", "not examined", "–"]
    page.click("#run-2")
    settled(page)
    assert page.inner_text("h1") == "one_layer-s0" and not page.locator("#how").is_visible()


@pytest.mark.parametrize("key", [*evidence(), "everything"])
def test_whatever_is_missing_the_rest_is_shown(show, key):
    """Files of other versions: a part is missing, null, or has nothing in it."""
    whole = evidence()
    less = [{k: v for k, v in whole.items() if k != key}, whole | {key: None}]
    if isinstance(whole.get(key), dict):
        less += [whole | {key: {}}, whole | {key: dict.fromkeys(whole[key])}]
    if key == "everything":
        less = [{}, {"answers": {}}]
    page = show(*(example(evidence=found) for found in less))
    for run in range(len(less)):
        page.click(f"#run-{run}")
        settled(page)
        assert hover_cell(page, 9, 4).endswith(f": {PATTERNS[-1][0][1, 2, 9, 4] / 255:.2f}")
        assert "undefined" not in page.inner_text("body") and "NaN" not in page.inner_text("body")


def test_numbers_that_are_not_finite_are_not_shown(show):
    found = evidence(losses={"first": known(float("nan")), "second": known(1), "gain": known(1)})
    found["behaviour"]["begun"]["accuracy"] = known(float("inf"))
    page = show(example(evidence=found))
    assert cells(page, 0)[3] == "–" and "first copy –" in page.inner_text("#detail")


def test_rows_that_the_page_does_not_show_are_left_out(tmp_path):
    found = evidence(rows=[{"tokens": "of a row"}])
    write_viewer(tmp_path / "page.html", [example(evidence=found)])
    assert "of a row" not in (tmp_path / "page.html").read_text()


# --- another run ----------------------------------------------------------------------------------

def test_selecting_a_run_shows_its_patterns_heads_text_and_evidence(show):
    runs = three_runs()
    page = show(*runs)
    page.click("#run-1")
    settled(page)
    assert page.inner_text("h1") == "toy-s1" and page.inner_text("#subtitle") == "of seed 1"
    assert page.inner_text("#summary") == "Taken from the second seed."
    assert page.inner_text("#head") == "L0H1 · prefix matching 0.95"        # its own best head
    pattern = runs[1].snapshots[-1].patterns[0][0, 1]
    assert hover_cell(page, 20, 6).endswith(f": {pattern[20, 6] / 255:.2f}")
    assert listed(page, "key") == strongest(pattern[20, :21])
    assert "Synthetic rows" not in page.inner_text("#notes")
    assert page.locator("#runs [aria-selected=true]").inner_text().startswith("toy-s1")
    # An earlier time stays selected when the run changes, and belongs to the other run.
    page.get_by_role("slider").press("Home")
    page.focus("#run-1")
    page.keyboard.press("ArrowDown")
    settled(page)
    assert page.inner_text("#now").startswith("step 0")
    assert page.evaluate("document.activeElement.id") == "run-2"
    scores = runs[2].scores["prefix_matching"].values[0]
    shown = [[float(page.inner_text(f"#L{layer}H{h}")) for h in range(H)] for layer in range(L)]
    assert np.abs(shown - scores).max() <= 0.005 + 1e-9
    page.hover(f"#token-{T - 1}")
    head = np.unravel_index(scores.argmax(), scores.shape)
    expected = strongest(runs[2].snapshots[0].patterns[0][head][T - 1])
    assert listed(page, "key") == expected
    page.keyboard.press("ArrowDown")                                        # there is no other
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    settled(page)
    assert page.inner_text("h1") == "toy-s0"


def test_runs_of_other_shapes_share_a_page(show):
    """Another number of layers, heads and tokens, fewer snapshots and no second passage."""
    T = 7
    patterns = np.round(255 * np.tri(T) / np.arange(1, T + 1)[:, None]).astype(np.uint8)
    patterns = np.broadcast_to(patterns, (1, 10, T, T)).copy()
    small = example(title="small", n_layers=1, n_heads=10, n_kv_heads=10, scores={}, curves={},
                    causal={}, passages=[PASSAGES[0]._replace(tokens=list("abcdefg"))],
                    snapshots=[PatternSnapshot(7, 7000, [patterns])])
    page = show(example(), small)
    page.select_option("#passage", "1")
    page.click("#run-1")
    settled(page)
    assert page.locator("#grid [role=gridcell]").count() == 10
    assert hover_cell(page, 4, 1) == "query 'e' (4) → key 'b' (1): 0.20"
    page.click("#run-0")
    settled(page)
    assert page.locator("#grid [role=gridcell]").count() == 8
    assert hover_cell(page, 5, 5).endswith(f": {PATTERNS[-1][0][1, 2, 5, 5] / 255:.2f}")


def test_each_run_has_its_own_line_in_the_plots_that_compare(show):
    page = show(*three_runs())
    compared = page.locator("#plots svg", has=page.locator("[class^=condition]"))
    assert compared.count() == 2
    best = compared.nth(0)
    assert best.locator("path").count() == 3 and best.locator("path.selected").count() == 1
    labels = best.locator("text[class^=condition]")
    assert sorted(labels.all_text_contents()) == ["one_layer-s0", "toy-s0", "toy-s1"]
    styles = {text.text_content(): text.get_attribute("class").split()[0]
              for text in labels.element_handles()}
    assert styles["toy-s0"] == styles["toy-s1"] != styles["one_layer-s0"]
    assert best.locator("text.selected").text_content() == "toy-s0"
    boxes = [text.bounding_box() for text in labels.element_handles()]
    tops = sorted(box["y"] for box in boxes)
    assert min(np.diff(tops)) >= 11 and tops[0] >= best.bounding_box()["y"] - 1
    page.click("#run-2")
    settled(page)
    assert best.locator("text.selected").text_content() == "one_layer-s0"
    assert compared.nth(1).locator("path").count() == 2         # the first has no such curve


# --- the whole page -------------------------------------------------------------------------------

def test_the_keyboard_reaches_everything_that_evidence_adds(show):
    view, *_ = with_losses()
    page = show(view._replace(evidence=evidence()), *three_runs()[1:])
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if reached[-1] == "slider":
            break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert [name for name in reached if not (name or "").startswith("pattern of L1")] == [
        "run-0", "score", "L1H2", "passage", "colour", "tokens", "path-L0H3-L1H2-k",
        "pattern of the sender L0H3", "pattern of the receiver L1H2", "play", "slider"]


def test_evidence_stays_text(show):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    found = evidence(run=hostile, condition=hostile, summary=hostile)
    found["answers"] = dict.fromkeys(found["answers"], hostile)
    found["mechanism"]["heads"][0] = {"head": hostile, "role": hostile}
    found["mechanism"]["paths"][0] |= {"sender": hostile, "receiver": '" onclick="alert(3)'}
    found["mechanism"]["peak"]["head"] = hostile
    found["transfer"]["by_period"] = {hostile: known(1)}
    page = show(example(evidence=found), *three_runs()[1:])
    assert page.inner_text("#summary") == hostile and cells(page, 0)[0] == hostile
    assert cells(page, 0)[2] == hostile and hostile in page.inner_text("#detail")
    assert page.title().startswith(hostile)
    assert page.locator("#paths [id]").count() == len(evidence()["mechanism"]["paths"]) - 1


def test_light_and_dark(show):
    pages = [show(*three_runs(), color_scheme=scheme) for scheme in ("light", "dark")]
    for drawn in ("document.querySelector('#pair canvas').toDataURL()",
                  "getComputedStyle($('path-L0H3-L1H2-k')).backgroundColor",
                  "getComputedStyle(document.querySelector('#bars .bar')).backgroundColor"):
        light, dark = (page.evaluate(drawn) for page in pages)
        assert light != dark
        pages[0].emulate_media(color_scheme="dark")                 # while it is open
        pages[0].wait_for_function(f"dark => {drawn} === dark", arg=dark)
        pages[0].emulate_media(color_scheme="light")
        pages[0].wait_for_function(f"light => {drawn} === light", arg=light)


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_is_wider_than_the_window(show, width):
    page = show(*three_runs("yes"), viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
