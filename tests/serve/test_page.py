"""The page at /: whole, closed off from the rest of the web, and, with ``-m browser``, used in a real browser."""

import dataclasses
import re
import shutil
import time

import pytest
from live_server import ENGINE, TEMPLATE, running, tiny_model

from mor_jax.infer.engine import Engine
from mor_jax.serve.page import make_page


def test_the_page_is_whole_and_loads_nothing_from_elsewhere():
    page = make_page('a "name" </script><b>', passes=3)
    assert page.html.count("<script>") == page.html.count("</script>") == 1
    assert "/*" not in page.html and not re.findall(r"https?://|//\w+\.|\bsrc=|@import|url\(", page.html)
    assert all(f".d{depth} {{ background: #" in page.html for depth in range(4))
    assert '{"model": "a \\"name\\" \\u003c/script>\\u003cb>", "passes": 3, "cuts": true, "chat": false}' in page.html
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy


def test_a_server_without_cuts_has_a_page_without_them():
    assert '"cuts": false, ' in make_page("tiny", passes=3, cuts=False).html


def test_every_input_has_a_label():
    html = make_page("tiny", passes=3).html
    inputs = set(re.findall(r'<(?:input|textarea) id="(\w+)"', html))
    assert inputs == set(re.findall(r'<label for="(\w+)"', html)) and len(inputs) == 8


@pytest.fixture(scope="module")
def client():
    with running(tiny_model(), request_seconds=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:  # without one on the path, playwright's own
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, client):
    """The page in a fresh tab; nothing may be logged as an error, and nothing asked of another server."""
    tab, errors, asked = browser.new_page(), [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"http://127.0.0.1:{client.port}/")
    yield tab
    tab.close()
    assert [error for error in errors if "400 (Bad Request)" not in error] == []
    assert {url for url in asked if not url.startswith((f"http://127.0.0.1:{client.port}/", "data:"))} == set()


def _expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


def _fill(page, **values):
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))


@pytest.mark.browser
def test_tokens_arrive_one_after_the_other_coloured_by_depth(page, client, monkeypatch):
    fields = {"prompt": "<b>Once</b>\n", "max_tokens": 40, "temperature": 1, "top_p": 1, "seed": 5}
    expected = client.complete(**fields, show_depth=True).json["choices"][0]
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.1), step(engine))[1])
    _fill(page, Prompt=fields["prompt"], Tokens_at_most=40, Temperature=1, Seed=5)
    page.get_by_label("Top-p").fill("1")
    page.get_by_role("button", name="Generate").click()
    tokens = page.locator("#text span[data-depth]")
    _expect(tokens.first).to_be_visible()
    early = tokens.count()
    _expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    _expect(page.get_by_role("status")).to_have_text("As many tokens as asked for", timeout=30_000)
    assert 0 < early < tokens.count()
    assert page.locator("#text").text_content() == fields["prompt"] + expected["text"]
    shown = [token for token in expected["tokens"] if token["text"]]
    assert [tokens.nth(i).get_attribute("class") for i in range(tokens.count())] == [f"d{t['depth']}" for t in shown]
    legend = page.get_by_role("list", name="Colours").get_by_role("listitem")
    assert legend.all_inner_texts() == ["1 pass", "2 passes", "3 passes"]
    colour = "element => getComputedStyle(element).backgroundColor"
    assert tokens.first.evaluate(colour) == legend.nth(shown[0]["depth"] - 1).evaluate(colour)
    _expect(page.locator("#progress")).to_contain_text("40 tokens, ")
    page.get_by_label("Show depths as numbers").check()
    number = tokens.first.evaluate("element => getComputedStyle(element, '::after').content")
    assert number == f'"{shown[0]["depth"]}"'


@pytest.mark.browser
def test_the_stop_button_frees_the_place(page, client, monkeypatch):
    cancelled = 'mor_completions_total{finish="cancelled"}'
    before = client.metric(cancelled)
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.1), step(engine))[1])
    _fill(page, Prompt="endless", Tokens_at_most=80, Seed=1)
    page.get_by_label("Prompt").press("Tab")  # the keyboard alone is enough
    page.keyboard.press("Enter")
    _expect(page.locator("#text span[data-depth]").first).to_be_visible()
    page.get_by_role("button", name="Stop").press("Enter")
    _expect(page.get_by_role("status")).to_have_text("Stopped")
    _expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    while client.metric("mor_running_sequences"):
        time.sleep(0.1)
    assert client.metric(cancelled) == before + 1


@pytest.mark.browser
def test_a_page_without_cuts_asks_for_none(browser):
    with running(tiny_model(), dataclasses.replace(ENGINE, cuts=False)) as client:
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{client.port}/")
        _expect(tab.get_by_label("Top-p")).to_be_disabled()
        _fill(tab, Prompt="Once", Tokens_at_most=6)
        tab.get_by_role("button", name="Generate").click()
        _expect(tab.get_by_role("status")).to_have_text("As many tokens as asked for", timeout=30_000)
        tab.close()


@pytest.mark.browser
def test_a_model_without_a_template_offers_no_chat(page):
    _expect(page.get_by_label("Chat", exact=True)).to_be_hidden()
    _expect(page.get_by_role("button", name="New conversation")).to_be_hidden()


@pytest.mark.browser
def test_a_conversation_goes_on_coloured_by_depth_and_begins_anew(browser):
    with running(tiny_model(TEMPLATE)) as client:
        tab, asked, errors = browser.new_page(), [], []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
        tab.goto(f"http://127.0.0.1:{client.port}/")
        tab.get_by_label("Chat", exact=True).check()
        _fill(tab, Tokens_at_most=12, Temperature=0)
        turns = []
        for text in ("<b>Hi</b>", "And?"):
            expected = client.chat(*turns, text, max_tokens=12, temperature=0, top_p=0.95, show_depth=True).json
            _fill(tab, Prompt=text)
            tab.get_by_role("button", name="Generate").click()
            _expect(tab.get_by_role("status")).to_have_text("As many tokens as asked for", timeout=30_000)
            _expect(tab.get_by_label("Prompt")).to_have_value("")
            (choice,) = expected["choices"]
            turns += [text, choice["message"]["content"]]
            assert [message["content"] for message in asked[-1]["messages"]] == turns[:-1]
            shown = [token for token in choice["tokens"] if token["text"]]
            tokens = tab.locator("#text span[data-depth]")
            depths = [tokens.nth(i).get_attribute("class") for i in range(tokens.count())]
            assert depths[-len(shown) :] == [f"d{token['depth']}" for token in shown]
        said = ["You" + turns[0], "tiny" + turns[1], "You" + turns[2], "tiny" + turns[3]]
        assert tab.locator("#text").text_content() == "".join(said)
        tab.get_by_role("button", name="New conversation").click()
        _expect(tab.locator("#text")).to_be_empty()
        _fill(tab, Prompt="x" * 90)
        tab.get_by_role("button", name="Generate").click()
        _expect(tab.get_by_role("status")).to_contain_text("Error: ")
        _expect(tab.get_by_label("Prompt")).to_have_value("x" * 90)  # a question without an answer can be changed
        _expect(tab.locator("#text")).to_be_empty()
        assert errors == []
        tab.close()


@pytest.mark.browser
def test_a_refusal_is_shown(page):
    _fill(page, Prompt="x" * 90, Tokens_at_most=40)
    page.get_by_role("button", name="Generate").click()
    _expect(page.get_by_role("status")).to_contain_text("Error: prompt (90 tokens) and max_tokens=40 exceed")
    _expect(page.get_by_role("button", name="Generate")).to_be_enabled()
