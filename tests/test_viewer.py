"""report.html in a real browser: what it shows is what the arrays hold."""

import re
import shutil

import numpy as np
import pytest

from induction.history import Curve
from induction.scores import SCORES
from report.viewer import Passage, PatternSnapshot, View, write_viewer

sync_playwright = pytest.importorskip("playwright.sync_api",
                                      reason="playwright is not installed").sync_playwright
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM,
                                reason="no chromium here (Debian: apt install chromium)")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

L, H, T = 2, 4, 24
PASSAGES = [Passage("random tokens", [f"t{i}" for i in range(T)]),
            Passage("python", ["def", " f", "(", ")", ":", "\n", "\t", "pass"])]
TOKENS_SEEN = np.array([0, 1e5, 2e5, 5e5, 1e6])


def random_patterns(T: int, seed: int) -> np.ndarray:
    """Peaked causal patterns of all heads, (L, H, T, T) uint8."""
    logits = np.random.default_rng(seed).normal(0, 2, (L, H, T, T))
    weights = np.exp(logits) * np.tri(T)
    return np.round(weights / weights.sum(-1, keepdims=True) * 255).astype(np.uint8)


PATTERNS = [[random_patterns(len(p.tokens), 10 * s + n) for n, p in enumerate(PASSAGES)]
            for s in range(len(TOKENS_SEEN))]
PREFIX = np.random.default_rng(0).uniform(0, 1, (5, L, H)).round(3)
PREFIX[-1, 1, 2] = 1                            # so L1H2 is the head that the page opens with


def example(**changes) -> View:
    snapshots = [PatternSnapshot(int(t / 1000), int(t), patterns)
                 for t, patterns in zip(TOKENS_SEEN, PATTERNS)]
    scores = {"prefix_matching": Curve(TOKENS_SEEN, PREFIX),
              "copying": Curve(TOKENS_SEEN, 1 - 2 * PREFIX),
              "of_our_own": Curve(TOKENS_SEEN, 9 * PREFIX)}
    curves = {"train/loss": Curve(np.arange(1001) * 1e3, np.linspace(6, 2, 1001)),
              "icl/score": Curve(TOKENS_SEEN, np.array([0, 0, np.nan, -1, -2]))}
    return View(title="a run", subtitle="2 layers × 4 heads", n_layers=L, n_heads=H, n_kv_heads=2,
                passages=PASSAGES, snapshots=snapshots,
                scores=scores, scored="repeated random tokens", curves=curves,
                marks={"onset": 2e5, "end": 5e5},
                causal={"L1H2": 2.1, "L0H0": -0.004}, causal_loss="second copy", causal_step=1000,
                notes=["Synthetic rows cause the formation."])._replace(**changes)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Write a view and open it. Whatever a test does, the page must request nothing but itself and
    log no error."""
    complaints, contexts = [], []

    def open_view(view: View, **options):
        path = tmp_path / "report.html"
        write_viewer(path, [view])
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}, **options))
        contexts[-1].set_default_timeout(0)                 # however busy the machine is
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url)
                if request.url != path.as_uri() else None)
        page.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
        page.goto(path.as_uri(), wait_until="commit")
        return settled(page)

    yield open_view
    for context in contexts:
        context.close()
    assert not complaints


def settled(page):
    page.wait_for_selector("#pattern[aria-busy=false]", state="attached")
    return page


def hover_cell(page, q: int, k: int) -> str:
    """Point at a cell of the matrix and read what the page says about it."""
    x, y = page.evaluate("([q, k]) => [GUTTER + (k + .5) * matrixSize().cell, "
                         "TOP + (q + .5) * matrixSize().cell]", [q, k])
    page.hover("#matrix", position={"x": x, "y": y})
    return page.inner_text("#readout")


def listed(page, which: str) -> list[tuple[int, str]]:
    """The tokens listed as looked at ("key") or as looking ("query"), with their weights."""
    return page.eval_on_selector_all(
        f"#strongest .{which} li",
        "rows => rows.map(row => [+row.dataset.i, row.lastChild.textContent])")


def strongest(weights: np.ndarray, first: int = 0) -> list[list]:
    order = sorted(range(len(weights)), key=lambda i: -int(weights[i]))[:5]
    # A weight of 1/255 reads 0.00 and is not listed.
    return [[first + i, f"{weights[i] / 255:.2f}"] for i in order if weights[i] > 1]


def background(page, selector: str) -> str:
    return page.eval_on_selector(selector, "element => getComputedStyle(element).backgroundColor")


def test_it_opens_with_the_last_snapshot_and_the_head_that_matches_prefixes_best(show):
    page = show(example())
    assert page.title() == "a run" and page.inner_text("h1") == "a run"
    assert page.inner_text("#now") == "step 1,000\n1M tokens"
    assert page.inner_text("#head") == (
        "L1H2 · prefix matching 1.00 · ablated: second copy +2.10 nats")
    assert page.get_by_role("gridcell", selected=True).inner_text() == "1.00"
    notes = page.inner_text("#notes")
    assert "Attention weights show what was averaged, not what was used." in notes
    assert "Synthetic rows cause the formation." in notes
    assert {"onset", "end"} <= set(page.locator("#plots text").all_text_contents())


def test_hover_and_selection_read_the_array(show):
    page = show(example())
    pattern = PATTERNS[-1][0][1, 2]
    for q, k in ((23, 0), (17, 3), (5, 5)):
        value = f"{pattern[q, k] / 255:.2f}"
        assert hover_cell(page, q, k) == f"query 't{q}' ({q}) → key 't{k}' ({k}): {value}"
        assert listed(page, "key") == strongest(pattern[q, :q + 1])
        assert listed(page, "query") == strongest(pattern[q + 1:, q], q + 1)
    page.hover("#token-9")
    assert listed(page, "key") == strongest(pattern[9, :10])
    looked_at, looking = pattern[9, :9].argmax(), 10 + pattern[10:, 9].argmax()
    colours = [background(page, f"#token-{token}") for token in (looked_at, looking)]
    assert colours[0] != colours[1]

    page.click("#token-9")                                          # stays selected …
    page.hover("#token-20")
    assert listed(page, "key") == strongest(pattern[20, :21])
    page.hover("h1")
    assert listed(page, "key") == strongest(pattern[9, :10])        # … after hovering elsewhere
    page.click("#L0H1")
    settled(page)
    expected = strongest(PATTERNS[-1][0][0, 1, 9, :10])
    assert listed(page, "key") == expected                          # … and in another head
    page.click("#siblings button:nth-child(4)")
    assert page.inner_text("#head").startswith("L0H3")
    hover_cell(page, 12, 1)
    page.mouse.down()
    page.mouse.up()
    page.hover("h1")
    assert page.inner_text("#tokens [aria-selected=true]") == "t12"


def test_time_moves_by_slider_plot_and_play(show):
    page = show(example())
    page.get_by_role("slider").press("Home")
    assert "ablated" not in page.inner_text("#head")                # which was measured at the end
    for snapshot in range(3):
        assert page.get_by_role("slider").get_attribute("aria-valuenow") == str(snapshot)
        settled(page)
        assert hover_cell(page, 11, 4).endswith(f": {PATTERNS[snapshot][0][1, 2, 11, 4] / 255:.2f}")
        assert page.inner_text("#L0H3") == f"{PREFIX[snapshot, 0, 3]:.2f}"
        page.get_by_role("slider").press("ArrowRight")
    x = page.evaluate("xOf(5.1e5)")
    page.locator("#plots svg").nth(1).click(position={"x": x, "y": 40})
    assert page.inner_text("#now") == "step 500\n500K tokens"
    cursors = page.eval_on_selector_all(
        "svg .cursor", "lines => lines.map(line => +line.getAttribute('x1'))")
    assert len(cursors) >= 4 and set(cursors) == {page.evaluate("xOf(5e5)")}
    box = page.locator("#slider").bounding_box()
    page.mouse.move(box["x"] + x, box["y"] + 12)
    page.mouse.down()
    page.mouse.move(box["x"] + page.evaluate("xOf(0)"), box["y"] + 12, steps=3)
    page.mouse.up()
    assert page.inner_text("#now").startswith("step 0")
    clicked = page.evaluate("button => { button.click(); return button.innerText }",
                            page.query_selector("#play"))
    assert clicked == "Pause"
    page.get_by_text("Play").wait_for()
    assert page.inner_text("#now").startswith("step 1,000")


def test_the_score_colours_the_grid(show):
    page = show(example())
    before = [background(page, f"#L1H{h}") for h in range(H)]
    page.select_option("#score", "copying")
    assert [background(page, f"#L1H{h}") for h in range(H)] != before
    assert page.inner_text("#L1H2") == "-1.00"
    assert SCORES["copying"] in page.inner_text("#explanation")
    page.select_option("#score", "of_our_own")                      # a name unknown to the page
    assert page.inner_text("#L1H2") == "9.0"
    assert page.inner_text("#explanation") == "Scores on repeated random tokens, step 1,000."
    assert "of our own" in page.locator("#plots text").all_text_contents()


def test_scores_and_ablation_belong_to_the_tokens_and_the_step_they_name(show):
    """Only three of five snapshots were scored: the page shows no number of another step."""
    scored = Curve(TOKENS_SEEN[[0, 2, 4]], PREFIX[[0, 2, 4]])
    page = show(example(scores={"prefix_matching": scored}, scored="the given text",
                        causal_loss="loss on the given text", causal_step=500))
    page.get_by_role("slider").press("Home")
    for snapshot, number in enumerate([f"{PREFIX[0, 1, 2]:.2f}", "–", f"{PREFIX[2, 1, 2]:.2f}", "–",
                                       "1.00"]):
        step = f"{TOKENS_SEEN[snapshot] / 1000:,.0f}"
        assert page.inner_text("#L1H2") == number
        assert page.inner_text("#explanation").startswith(
            f"Scores on the given text, step {step}. prefix matching: ")
        ablated = "ablated: loss on the given text +2.10 nats"
        assert (ablated in page.inner_text("#head")) == (step == "500")
        page.get_by_role("slider").press("ArrowRight")
    assert "second copy" not in page.inner_text("body")


def test_a_signed_score_is_neutral_at_zero_and_its_legend_says_so(show):
    values = np.array([[[-0.9, -0.3, 0, 0.9], [0.3, -0.004, 1, 0.5]]])
    fractions = np.abs(values)
    page = show(example(snapshots=example().snapshots[-1:], curves={}, marks={}, scores={
        "copying": Curve(TOKENS_SEEN[-1:], values), "entropy": Curve(TOKENS_SEEN[-1:], fractions)}))
    page.select_option("#score", "copying")
    assert page.locator("#scale span").all_inner_texts() == ["−1", "0", "1"]
    assert page.inner_text("#L0H0") == "-0.90" and page.inner_text("#L1H1") == "0.00"
    assert background(page, "#L0H2") == "rgba(0, 0, 0, 0)"              # 0: the page's own colour
    negative, positive = background(page, "#L0H0"), background(page, "#L0H3")
    warm, cool = (page.evaluate(
        "colour => { const pen = make('canvas').getContext('2d'); pen.fillStyle = colour;"
        "pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data] }", colour)
        for colour in (negative, positive))
    assert warm[0] > warm[2] + 50 and cool[2] > cool[0] + 50            # orange, blue
    bar = "getComputedStyle(document.getElementById('scale'), '::before').backgroundImage"
    signed = page.evaluate(bar)
    page.select_option("#score", "entropy")
    assert page.locator("#scale span").all_inner_texts() == ["0", "1"]
    assert background(page, "#L0H0") == positive and page.evaluate(bar) != signed


def test_ticks_are_round_numbers(show):
    """Steps of 0.1 do not add up to 0: the axis must not say 2.8e-17."""
    curve = Curve(TOKENS_SEEN, np.array([-0.1, -0.15, -0.2, -0.3, -0.37]))
    page = show(example(curves={"icl/score": curve}, marks={}, scores={}))
    ticks = page.locator("#plots text[text-anchor=end]").all_text_contents()
    assert ticks == ["-0.4", "-0.3", "-0.2", "-0.1", "0"]


def test_another_passage(show):
    page = show(example())
    page.select_option("#passage", label="python")
    settled(page)
    value = f"{PATTERNS[-1][1][1, 2, 6, 5] / 255:.2f}"
    assert hover_cell(page, 6, 5) == f"query '⇥' (6) → key '↵' (5): {value}"


def test_the_keyboard_reaches_everything(show):
    page = show(example())
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(
            "document.activeElement.id || document.activeElement.textContent"))
        ring = "getComputedStyle(document.activeElement).outlineStyle"
        if reached[-1] == "slider":
            ring = "getComputedStyle(document.querySelector('#slider:focus .knob')).stroke"
        assert page.evaluate(ring) != "none", f"no focus to be seen on {reached[-1]}"
        match reached[-1]:
            case "L1H2":
                for key in ("ArrowDown", "ArrowLeft", "Enter"):
                    page.keyboard.press(key)
                assert page.inner_text("#head").startswith("L0H1")
            case "tokens":
                for key in ("Home", "ArrowRight", "ArrowRight"):
                    page.keyboard.press(key)
                assert listed(page, "key") == strongest(PATTERNS[-1][0][0, 1, 2, :3])
                page.keyboard.press("Escape")
                assert not listed(page, "key")
            case "slider":
                page.keyboard.press("ArrowLeft")
                assert page.inner_text("#now").startswith("step 500")
                break
    assert [name for name in reached if not name.startswith("H")] == [
        "score", "L1H2", "passage", "tokens", "play", "slider"]


def test_text_stays_text(show):
    hostile = ["</script><script>alert(1)</script>", "<!--<script>", "\u2028\u2029",
               "<img src=x onerror=alert(1)>", "\ud800", "",
               "VIEW_AS_JSON", "שלום"]
    page = show(example(title="</title><script>alert(2)</script><!--", subtitle="<b>bold</b>",
                        notes=["<i>note</i>"],
                        passages=[PASSAGES[0], Passage("<script>alert(3)</script>", hostile)]))
    assert page.title() == page.inner_text("h1") == "</title><script>alert(2)</script><!--"
    assert page.inner_text("#subtitle") == "<b>bold</b>"
    assert "<i>note</i>" in page.inner_text("#notes")
    page.select_option("#passage", "1")
    settled(page)
    shown = [page.text_content(f"#token-{i}") for i in range(len(hostile))]
    assert shown[:4] == hostile[:4] and shown[5:] == ["∅", "VIEW_AS_JSON", "שלום"]
    assert "key '</script><script>alert(1)</script>' (0)" in hover_cell(page, 3, 0)


def test_light_and_dark(show):
    pages = [show(example(), color_scheme=scheme) for scheme in ("light", "dark")]
    matrix = "document.getElementById('matrix').toDataURL()"
    for drawn in ("getComputedStyle(document.body).backgroundColor", matrix):
        light, dark = (page.evaluate(drawn) for page in pages)
        assert light != dark
    before = pages[0].evaluate(matrix)
    pages[0].emulate_media(color_scheme="dark")                     # while it is open
    pages[0].wait_for_function(f"before => {matrix} !== before", arg=before)


def test_a_single_snapshot_needs_no_slider(show):
    page = show(example(snapshots=example().snapshots[-1:], n_kv_heads=H, scores={}, curves={},
                        marks={}, causal={}, passages=PASSAGES))
    assert not page.locator("#slider").is_visible() and not page.locator("#play").is_visible()
    assert not page.locator("#grid .group").count()                 # every head has its own keys
    page.click("#L1H3")
    assert hover_cell(page, 8, 2).endswith(f": {PATTERNS[-1][0][1, 3, 8, 2] / 255:.2f}")


def test_heads_that_share_keys_are_bracketed(show):
    page = show(example())
    assert page.locator("#grid .group").all_inner_texts() == ["kv 0", "kv 1"]
    boxes = [page.locator("#grid .group").nth(k).bounding_box() for k in range(2)]
    for h in range(H):
        cell = page.locator(f"#L0H{h}").bounding_box()
        middle = cell["x"] + cell["width"] / 2
        assert boxes[h // 2]["x"] < middle < boxes[h // 2]["x"] + boxes[h // 2]["width"]


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window(show, width):
    page = show(example())
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.html"
    write_viewer(path, [example()])
    before = path.read_bytes()

    def torn():
        yield from example().snapshots[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_viewer(path, [example(snapshots=torn())])
    message = "patterns of 'random tokens' are float64 (2, 4, 24, 24), not uint8 (2, 4, 24, 24)"
    with pytest.raises(ValueError, match=re.escape(message)):
        floats = [pattern / 255 for pattern in PATTERNS[0]]
        write_viewer(path, [example(snapshots=[PatternSnapshot(0, 0, floats)])])
    with pytest.raises(ValueError, match="at least one snapshot"):
        write_viewer(path, [example(snapshots=[])])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_fifty_snapshots_of_512_tokens_are_seen_at_once(show, tmp_path):
    """2 layers × 12 heads: 157 MB of weights in a file of at most 60 MB, which paints before it has
    been read to its end."""
    rng, T, n = np.random.default_rng(0), 512, 50
    logits = rng.normal(0, 2, (6, T, T)).astype(np.float32)
    for head, lag in enumerate((1, 64, 128)):
        logits[head] += 7 * np.eye(T, k=-lag)
    weights = np.exp(logits) * np.tri(T, dtype=np.float32)
    weights = np.round(weights / weights.sum(-1, keepdims=True) * 255).astype(np.uint8)

    def snapshots():
        for step in range(n):                           # no two alike, for the price of one softmax
            heads = np.concatenate([np.roll(weights, step, axis=0)] * 4)
            patterns = (heads * np.tri(T, dtype=np.uint8)).reshape(2, 12, T, T)
            yield PatternSnapshot(step, step * 1000, [patterns])

    page = show(example(n_heads=12, n_kv_heads=12, snapshots=snapshots(), scores={}, causal={},
                        passages=[Passage("long", [f"w{i}" for i in range(T)])]))
    page.wait_for_load_state("domcontentloaded")
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    read = page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive")
    size = (tmp_path / "report.html").stat().st_size
    print(f"{size / 1e6:.1f} MB, first paint after {paint:.0f} ms, "
          f"read to the end after {read:.0f} ms")
    assert size <= 60e6 and paint < read
    page.get_by_role("slider").press("Home")            # the far end of the file
    page.get_by_role("slider").press("ArrowRight")
    settled(page)
    assert page.evaluate("weight(2, 400, 336)") == weights[1, 400, 336] / 255 > 0
