"""What report.html shows of how induction heads work, and of what each token costs."""

import copy

import numpy as np
import pytest
from viewer_cases import (
    PATTERNS,
    H,
    T,
    background,
    evidence,
    example,
    known,
    settled,
    with_losses,
)

pytest_plugins = ["browser"]


# --- how ------------------------------------------------------------------------------------------

def pixels(page, button: int) -> np.ndarray:
    """The pattern that is drawn for the sender (0) or the receiver (1), as weights · 255."""
    drawn = page.evaluate("""n => {
        const canvas = document.querySelectorAll('#pair canvas')[n];
        const image = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return [...new Uint32Array(image.data.buffer)] }""", button)
    return np.array(drawn).reshape(T, T)


def drawn_as(page, pattern: np.ndarray) -> np.ndarray:
    return np.array(page.evaluate("[...ramp]"))[pattern]


def test_a_path_shows_its_sender_and_its_receiver(show):
    page = show(example(evidence=evidence()))
    caption = "L0H3 → keys of L1H2: +6.20 nats (5.9–6.5) without this path"
    assert page.inner_text("#pair-caption") == caption              # the strongest, when it opens
    assert page.inner_text("#path-L0H3-L1H2-k") == "6.2"
    senders = page.locator("#paths [role=rowheader]").all_inner_texts()
    assert senders == [f"L0H{h}" for h in range(H)]
    patterns = PATTERNS[-1][0]
    assert (pixels(page, 0) == drawn_as(page, patterns[0, 3])).all()
    assert (pixels(page, 1) == drawn_as(page, patterns[1, 2])).all()

    page.click("#path-L0H1-L1H0-v")
    settled(page)
    assert page.inner_text("#pair-caption").startswith("L0H1 → values of L1H0: −0.40 nats")
    assert page.inner_text("#head").startswith("L1H0")              # the page's head, too
    page.get_by_role("slider").press("Home")
    settled(page)
    patterns = PATTERNS[0][0]
    assert (pixels(page, 0) == drawn_as(page, patterns[0, 1])).all()
    assert (pixels(page, 1) == drawn_as(page, patterns[1, 0])).all()
    page.click("#pair button:first-child")
    assert page.inner_text("#head").startswith("L0H1")

    page.hover("#path-L0H3-L1H2-k")
    assert page.inner_text("#path-readout") == caption
    assert page.get_attribute("#path-L0H3-L1H2-k", "title") == caption
    page.hover("h1")
    page.focus("#path-L0H1-L1H0-v")
    for key, path in (("ArrowDown", "L0H2-L1H0-v"), ("ArrowLeft", "L0H2-L1H0-k"),
                      ("ArrowUp", "L0H1-L1H0-k")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"path-{path}"
        assert page.inner_text("#path-readout").startswith(f"{path[:4]} → ")
    page.keyboard.press("Enter")
    settled(page)
    assert page.inner_text("#pair-caption").startswith("L0H1 → keys of L1H0: −0.20 nats")


def test_paths_are_blue_if_they_help_and_orange_if_they_harm(show):
    page = show(example(evidence=evidence()))
    rgb = {path: page.evaluate(
        "colour => { const pen = make('canvas').getContext('2d'); pen.fillStyle = colour;"
        "pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data] }",
        background(page, f"#path-{path}")) for path in ("L0H3-L1H2-k", "L0H0-L1H0-v")}
    assert rgb["L0H3-L1H2-k"][2] > rgb["L0H3-L1H2-k"][0]
    assert rgb["L0H0-L1H0-v"][0] > rgb["L0H0-L1H0-v"][2]
    assert page.locator("#path-scale span").all_inner_texts() == ["−6.2", "0", "6.2"]


def test_bars_are_as_long_as_the_gain_that_is_lost(show):
    page = show(example(evidence=evidence()))
    names = [name for name in page.locator("#bars .name").all_inner_texts() if name]
    assert names == ["without these heads' induction edges", "without as many random edges",
                     "reading other tokens over them", "without all heads' induction edges",
                     "these heads mean-ablated"]
    gains = [evidence()["mechanism"]["knockout"][kind]["gain"]["value"]
             for kind in ("begun", "bare")]
    assert page.locator("#bars p").all_inner_texts()[-1] == (
        f"of a gain of {gains[0]:.2f} nats behind the begin token, {gains[1]:.2f} nats without it")
    step = evidence()["step"]
    assert page.locator("#how .examined").all_inner_texts() == [f"at step {step:,}"] * 2
    assert "faint" not in (page.get_attribute("#bars", "class") or "")
    assert page.locator("#bars .number").all_inner_texts() == [
        "93% (90–96)", "50% (40–60)", "−1% (−4 to 2)", "7%", "102% (98–106)", "97% (94–100)",
        "97% (94–100)", "150% (140–160)"]
    drawn = page.eval_on_selector_all("#bars .track", """tracks => tracks.map(track => {
        const box = element => element?.getBoundingClientRect();
        const ticks = [...track.querySelectorAll('.tick')].map(tick => box(tick).left);
        const at = x => (x - ticks[0]) / (ticks[2] - ticks[0]);
        const [bar, whisker] = ['.bar', '.whisker'].map(name => box(track.querySelector(name)));
        return [at(bar.left), at(bar.right),
                whisker && [at(whisker.left), at(whisker.right)]] })""")
    assert drawn[0][:2] == pytest.approx([0, 0.93], abs=0.02)
    assert drawn[0][2] == pytest.approx([0.9, 0.96], abs=0.02)
    assert drawn[1][:2] == pytest.approx([0, 0.5], abs=0.02)
    assert drawn[2][:2] == pytest.approx([-0.01, 0], abs=0.02)
    assert drawn[3][2] is None                                      # no interval, no whisker
    assert drawn[7][1] == pytest.approx(1.25, abs=0.02)             # cut; its number says 150%
    findings = page.locator("#findings li").all_inner_texts()
    assert "L1H2 attends most 2 tokens before it (0.75)" in findings
    assert any(line.startswith("Previous-token heads L0H3 mean-ablated: +6.10 nats")
               for line in findings)


def test_what_is_lost_of_hardly_any_gain_is_faint(show):
    found = copy.deepcopy(evidence())
    found["answers"]["behaviour"] = "no"
    assert "faint" in show(example(evidence=found)).get_attribute("#bars", "class")


def test_what_rounds_to_zero_has_no_sign(show):
    found = copy.deepcopy(evidence())
    found["mechanism"]["knockout"]["begun"] |= {
        "gain_removed": known(0.999, 0.998, 1.001), "by_random": known(-0.001, -0.004, 0.02)}
    page = show(example(evidence=found))
    numbers = page.locator("#bars .number").all_inner_texts()
    assert numbers[0] == "100% (100–100)" and numbers[2] == "0% (0–2)"


def test_without_a_repeat_gain_there_are_no_bars(show):
    found = copy.deepcopy(evidence())
    for pair in ("knockout", "knockout_all_heads"):
        for kind in ("begun", "bare"):
            found["mechanism"][pair][kind] |= {"gain_removed": None, "by_random": None,
                                               "by_misreading": None}
    found["mechanism"]["ablation"]["gain_removed"] = None
    page = show(example(evidence=found))
    assert not page.locator("#bars .bar").count() and page.inner_text("#findings")


# --- heads and their intervals --------------------------------------------------------------------

def test_a_heads_interval_is_shown_at_the_step_it_was_measured(show):
    page = show(example(evidence=evidence()))
    whole = ("L1H2 · prefix matching 0.94 (0.92–0.96) · ablated: second copy +2.10 nats (1.9–2.3)")
    assert page.inner_text("#head") == whole
    assert page.inner_text("#L1H2") == "0.94"
    page.hover("#L1H2")
    assert page.inner_text("#pointed") == page.get_attribute("#L1H2", "aria-label") == whole
    page.hover("h1")
    assert page.inner_text("#pointed") == ""
    page.focus("#L1H2")
    assert page.inner_text("#pointed") == whole
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#pointed").startswith("L0H2 · prefix matching 0.")
    page.get_by_role("slider").press("ArrowLeft")
    assert "(" not in page.inner_text("#head")


# --- losses ---------------------------------------------------------------------------------------

def test_losses_shade_the_text_and_are_read_out(show):
    view, losses, right = with_losses()
    page = show(view)
    page.hover("#token-9")
    result = "right" if right[-1][0][8] else "wrong"
    assert page.inner_text("#cost") == f"'t9' (9): {losses[-1][0][8]:.2f} nats, predicted {result}"
    attention = background(page, "#token-9")
    page.select_option("#colour", "loss")
    for snapshot in (-1, 0):
        page.get_by_role("slider").press("End" if snapshot else "Home")
        settled(page)
        for token in (1, 5, 17, T - 1):
            loss, was_right = losses[snapshot][0][token - 1], right[snapshot][0][token - 1]
            share = min(1, loss / np.log(50))
            same = page.evaluate("""([token, share]) => {
                const probe = make('span');
                document.body.append(probe);
                paint(probe, 'query', share);
                const shade = element => getComputedStyle(element).backgroundColor
                    .match(/[\\d.e-]+/g).map(Number);
                const [one, two] = [shade(probe), shade($(`token-${token}`))];
                probe.remove();
                return Math.max(...one.map((value, i) => Math.abs(value - two[i])));
            }""", [token, float(share)])
            assert same < 1e-3
            underlined = "right" in page.get_attribute(f"#token-{token}", "class").split()
            assert underlined == was_right
            page.hover(f"#token-{token}")
            said = f"{loss:.2f} nats, predicted {'right' if was_right else 'wrong'}"
            assert page.inner_text("#cost") == f"'t{token}' ({token}): {said}"
            assert page.get_attribute(f"#token-{token}", "title") == said
    assert background(page, "#token-0") == "rgba(0, 0, 0, 0)"       # nothing predicts it
    assert page.locator("#loss-scale span").all_inner_texts() == ["0", "3.9 nats, as guessing"]
    assert "predicted right" in page.inner_text("#cost-legend")
    page.select_option("#colour", "attention")
    page.get_by_role("slider").press("End")
    settled(page)
    page.hover("#token-9")
    assert background(page, "#token-9") == attention
    assert not page.locator("#cost-legend").is_visible()


def test_an_infinite_loss_is_drawn_like_the_worst(show):
    view, _, _ = with_losses()
    page = show(view)
    page.select_option("#colour", "loss")
    worst = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--query')")
    strongest_shade = page.evaluate(
        "colour => { const probe = make('span'); document.body.append(probe);"
        "paint(probe, 'query', 1); return getComputedStyle(probe).backgroundColor }", worst)
    assert background(page, "#token-7") == strongest_shade
    assert page.get_attribute("#token-7", "title").startswith("∞ nats")


def test_snapshots_of_earlier_versions_have_no_losses(show):
    page = show(example())
    assert not page.locator("#colour, #cost").filter(visible=True).count()
    view, losses, _ = with_losses(vocab_size=None)                  # the scale ends at the highest
    view = view._replace(snapshots=[example().snapshots[0], *view.snapshots[1:4]])
    page = show(view)
    page.select_option("#colour", "loss")
    assert page.locator("#loss-scale span").last.inner_text() == f"{losses[3][0].max():.1f} nats"
    page.get_by_role("slider").press("Home")
    settled(page)
    assert not page.locator("#colour, #cost-legend").filter(visible=True).count()
