"""The report of a run in a real browser: hostile text stays text, the search finds, charts are drawn."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import Browser
from test_report import DIED, LINE, Page, example, hostile_run, make_run, save_evaluation
from tiny import make_group

from gvpo_ray.observe.report import page as report
from gvpo_ray.observe.token_examples import write_examples


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture
def browse(browser):
    """`browse(path, …)`: the page after its scripts ran, as a Page, and what the console said. `probe` is a
    script that runs after them, for which the policy goes.
    """

    def browse(path, fragment="", probe=None, keep_policy=False, **options):
        if probe is not None:
            text = path.read_text(encoding="utf-8")
            if not keep_policy:
                text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
            path = path.with_name("probed.html")
            path.write_text(text.replace("</body></html>", f"{probe}</body></html>"), encoding="utf-8")
        dom, console = browser.open(f"{path.resolve().as_uri()}{fragment}", **options)
        return Page(dom), console

    return browse


def probed(got):
    """What the probe said, as JSON."""
    return json.loads(got.texts["output"][0])


def says(script):
    """A probe that leaves what a JavaScript expression gives."""
    output = (
        "const output = document.createElement('output'); output.textContent = JSON.stringify(said); "
        "document.body.append(output);"
    )
    return f"<script>{{ const said = {script}; {output} }}</script>"


@pytest.fixture
def server():
    """A server that would be asked if a page asked anybody; `.asked` are the paths it was asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def attack(server):
    url = f"http://127.0.0.1:{server.server_port}"
    return (
        "</pre></td></title></style></script><img "
        f"src={url}/img><script>document.title='attacked';fetch('{url}/fetch')</script>"
        f"<style>body {{ background: url({url}/style) }}</style><link rel=stylesheet "
        f"href={url}/link><iframe src={url}/frame></iframe>\"'"
    )


@pytest.mark.browser
def test_in_a_browser_a_hostile_run_is_text_and_nobody_is_asked_for_anything(browse, tmp_path, server):
    file = report.write(hostile_run(tmp_path / "run", attack(server)))
    got, console = browse(file, fragment="#q=<img")
    tags = [tag for tag, _ in got.tags]
    assert (console, server.asked, got.texts["title"][0]) == ([], [], "run")
    assert not {*tags} & {"img", "link", "iframe", "i"} and (tags.count("script"), tags.count("style")) == (
        3,
        2,
    )
    assert got.texts["pre"].count(attack(server)) == 6 and "3 of 3" in got.texts["span"]


@pytest.mark.browser
def test_were_a_run_to_get_its_markup_into_the_page_the_policy_would_still_stop_it(browse, tmp_path, server):
    file = report.write(make_run(tmp_path / "run", [{"step": 1, **LINE}]))
    got, console = browse(file, probe=attack(server), keep_policy=True)
    assert (server.asked, got.texts["title"][0]) == ([], "run") and any(
        "Content Security Policy" in line for line in console
    )
    # so that the test can fail: without the policy it does all that
    got, _ = browse(file, probe=attack(server))
    assert {"/img", "/fetch", "/style", "/link", "/frame"} <= {*server.asked} and got.texts["title"][
        0
    ] == "attacked"


@pytest.mark.browser
def test_in_a_browser_the_search_shows_what_has_all_the_words_and_opens_where_it_is(
    browse, browser, tmp_path
):
    run_dir = tmp_path / "run"
    save_evaluation(
        run_dir,
        "x-step-000001.arrow",
        make_group(0, rewards=(1.0, 0.0), completions=["Apples are red", "pears"]),
    )
    save_evaluation(
        run_dir, "x-step-000002.arrow", make_group(0, rewards=(1.0, 0.0), completions=["red pears", "plums"])
    )
    file = report.write(make_run(run_dir, [{"step": 1, **LINE}]))

    seen = """(() => {
        const hidden = (selector) => [...document.querySelectorAll(selector)].map((one) => one.hidden);
        const last = [...document.querySelectorAll("details")].slice(-2);
        const folds = last.map((one) => [one.open, one.hidden]);
        const spans = [...document.querySelectorAll("span")].map((one) => one.textContent);
        return [hidden("article"), folds, spans.find((text) => / of |completions/.test(text))];
    })()"""
    both = f"""(() => {{
        const before = {seen};
        box.value = 'pears';
        box.dispatchEvent(new Event('input'));
        return [before, {seen}, location.hash];
    }})()"""
    got, console = browse(file, probe=says(both))
    assert probed(got) == [
        [[False] * 4, [[True, False], [False, False]], "4 completions"],
        [[False, True, True, False], [[True, False], [True, False]], "2 of 4"],
        "#q=pears",
    ] and (console == [])
    got, console = browse(file, fragment="#q=RED+apples", probe=says(seen))
    found = [[True, True, False, True], [[False, True], [True, False]], "1 of 4"]
    assert (probed(got), console) == (found, [])
    # under the policy, which goes for a probe: what is in the page itself
    dom, console = browser.open(f"{file.resolve().as_uri()}#q=RED+apples")
    articles = re.findall(r"<article[^>]*>", dom)
    assert [" hidden" in one for one in articles] == [True, True, False, True] and console == []


DRAW_ALL = """Promise.all(plots.map(draw)).then(() => {
    const said = SAID;
    const output = document.createElement('output'); output.textContent = JSON.stringify(said);
    document.body.append(output); })"""


def after_drawing(script):
    """A probe that draws all charts, and leaves what a JavaScript expression then gives."""
    return f"<script>{DRAW_ALL.replace('SAID', script)}</script>"


PLANTED = "</script><img src=x onerror=\"document.title='attacked'\"><b>bold</b>"


@pytest.mark.browser
def test_in_a_browser_markup_in_prompts_completions_config_and_names_of_metrics_stays_text(browse, tmp_path):
    file = report.write(hostile_run(tmp_path / "run", PLANTED))
    script = """({
        images: document.querySelectorAll("img, image[href^=http]").length,
        scripts: document.querySelectorAll("script").length,
        legends: [...document.querySelectorAll(".legendtext, .ytick text")].map((text) => text.textContent),
        bold: [...document.querySelectorAll(".plot [style*=bold]")].length,
        titles: plots.map((plot) => plot.getAttribute("aria-label")),
        texts: [...document.querySelectorAll("pre")].map((pre) => pre.textContent),
    })"""
    got, _ = browse(file, probe=after_drawing(script))
    said = probed(got)
    assert got.texts["title"][0] == "run" and said["images"] == 0 and said["bold"] == 0
    assert said["scripts"] == 4  # three of the page, and the probe
    assert PLANTED in said["titles"]  # the name of a metric
    assert any(text.startswith(PLANTED[:11]) for text in said["legends"])  # who an event happened to
    assert said["texts"].count(PLANTED) == 6  # prompts and completions
    assert any(PLANTED in text and "run_dir" in text for text in said["texts"])  # the config


@pytest.mark.browser
def test_in_a_browser_the_charts_are_drawn_under_the_policy_and_say_step_and_value_under_the_pointer(
    browse,
    tmp_path,
):
    for name, factor in (("one", 1), ("other", 2)):
        lines = ({"step": step, **LINE, "loss": factor * step} for step in range(1, 10_001))
        make_run(tmp_path / name, lines, [{**DIED, "step": step} for step in range(0, 10_000, 10)])
    file = report.write(tmp_path / "one", tmp_path / "other")
    got, console = browse(file, height=4000)
    assert console == []  # also nothing that the policy refused
    drawn = [attributes for _, attributes in got.tags if "js-plotly-plot" in attributes.get("class", "")]
    assert {"Loss", "Reward"} <= {attributes["aria-label"] for attributes in drawn}
    script = """(() => {
        const plot = plots.find((plot) => plot.getAttribute("aria-label") === "Loss");
        Plotly.Fx.hover(plot, { xval: 10000 });
        const texts = [...plot.querySelectorAll(".hoverlayer text")].map((text) => text.textContent);
        const before = plot._fullLayout.xaxis.range[1];
        Plotly.relayout(plot, { "xaxis.range": [1, 100] });
        return { texts, before, after: plot._fullLayout.xaxis.range[1],
                 legend: [...plot.querySelectorAll(".legendtext")].map((text) => text.textContent) };
    })()"""
    got, _ = browse(file, probe=after_drawing(script))
    said = probed(got)
    assert any("10,000" in text or "10000" in text for text in said["texts"])
    assert any("20,000" in text or "20000" in text for text in said["texts"]), said["texts"]
    assert said["before"] > 9_999 and said["after"] == 100 and said["legend"] == ["one", "other"]


@pytest.mark.browser
@pytest.mark.parametrize("dark", [True, False])
def test_in_a_browser_text_and_lines_stand_out_from_the_page_in_light_and_in_dark(browse, tmp_path, dark):
    run_dir = hostile_run(tmp_path / "run", "x" * 300)
    script = """(() => {
        const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const light = (text) => {
            const [r, g, b] = text.match(/[0-9.]+/g).map((value) => linear(value / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const page = light(getComputedStyle(document.body).backgroundColor);
        const stands = (selector, property) => [...document.querySelectorAll(selector)].map((element) => {
            const own = light(getComputedStyle(element)[property]);
            return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05) });
        document.querySelectorAll("details").forEach((fold) => (fold.open = true));
        const texts = "body, p, small, td, th, a, pre, code, summary, figcaption span span";
        return { page, texts: stands(texts, "color"),
                 words: stands(".xtick text, .ytick text, .legendtext", "fill"),
                 lines: stands(".js-line", "stroke"),
                 wide: [document.documentElement.scrollWidth, innerWidth] };
    })()"""
    got, console = browse(report.write(run_dir), width=500, dark=dark, probe=after_drawing(script))
    found = probed(got)
    assert (found["page"] < 0.05, found["page"] > 0.95) == (dark, not dark)
    assert min(found["texts"] + found["words"]) >= 4.5 and len(found["words"]) > 20
    assert min(found["lines"]) >= 3 and len(found["lines"]) > 5
    # nothing sticks out, on a narrow window too
    assert found["wide"][0] <= found["wide"][1] and console == []


@pytest.mark.browser
def test_in_a_browser_tokens_say_their_numbers_to_keys_and_to_a_touch_and_stand_out_from_their_colour(
    browse,
    tmp_path,
):
    many = {name: [-2.5, -1.0, None, -0.1] * 100 for name in ("policy", "push")}
    one = example(ids=[2, 3, 4, 5] * 100, sampler=[-0.5, -1.5, None, -0.1] * 100, **many)
    write_examples(tmp_path / "run", 1, [one])
    file = report.write(make_run(tmp_path / "run", [{"step": 1, **LINE}]))
    script = """(() => {
        const list = document.querySelector(".coloured pre[tabindex]"), said = list.nextElementSibling;
        const tokens = [...list.querySelectorAll("span")];
        const press = (key) => {
            list.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
            return said.textContent;
        };
        const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
        const solid = (text) => numbers(text).map((value) => text.startsWith("color") ? value : value / 255);
        const over = (top, below) => below.map((value, i) => value * (1 - top[3]) + top[i] * top[3]);
        const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        const box = solid(getComputedStyle(list).backgroundColor).slice(0, 3);
        const contrast = (token) => {
            const style = getComputedStyle(token);
            const own = light(solid(style.color).slice(0, 3));
            const below = light(over(solid(style.backgroundColor), box));
            return (Math.max(own, below) + 0.05) / (Math.min(own, below) + 0.05);
        };
        const colours = () => tokens.slice(0, 4).map((token) => getComputedStyle(token).backgroundColor);
        const depths = [...document.querySelectorAll(".legend span")].map(contrast);
        const bySampler = colours(), keys = ["ArrowRight", "ArrowRight", "ArrowLeft", "End"].map(press);
        tokens[2].click();
        const touched = said.textContent, chosen = document.querySelectorAll(".chosen").length;
        document.querySelector("#by-p").click();
        return { keys, touched, chosen, depths, bySampler, byPush: colours(),
                 wide: [document.documentElement.scrollWidth, innerWidth] };
    })()"""
    said = probed(browse(file, width=500, dark=True, probe=says(script))[0])
    assert said["keys"] == [
        "token 1 “[2]”: π 0.0821 · μ 0.607: −2 · push −2.5",
        "token 2 “[3]”: π 0.368 · μ 0.223: +0.5 · push −1",
        "token 1 “[2]”: π 0.0821 · μ 0.607: −2 · push −2.5",
        "token 400 “[5]”: π 0.905 · μ 0.905: 0 · push −0.1",
    ]
    assert said["touched"] == "token 3 “[4]”: the environment wrote it: read, not trained"
    assert said["chosen"] == 1 and len(said["depths"]) == 8 and min(said["depths"]) >= 4.5
    nothing = said["bySampler"][2]
    assert len({*said["bySampler"]}) == 3 and said["bySampler"][3] == nothing
    assert len({*said["byPush"]}) == 4 and said["byPush"][2] == nothing
    assert said["wide"][0] <= said["wide"][1]
