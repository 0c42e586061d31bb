"""The page in a real browser. Needs Playwright and Chromium; axe-core for accessibility."""

import base64
import time

import pytest


pytest.importorskip("gradio")
pytest.importorskip("playwright")

from tests.spaces_demo import browsing
from tests.spaces_demo.browsing import AXE, DESKTOP, PHONE, WAIT, ask, choose_example, chromium, open_page, wait_for
from tests.spaces_demo.conftest import ROOT


if browsing.CHROMIUM is None:
    pytest.skip("no Chromium: set CHROMIUM to its path", allow_module_level=True)

SHAPE = "What shape is in the image?"
# violations that axe-core finds in the markup of gradio itself
GRADIO_OWN: set[tuple[str, str]] = set()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    page = open_page(browser, server)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    page.context.close()
    assert not problems


def upload(page, file):
    page.set_input_files("#image input[type=file]", str(file))


def test_uploaded_image_is_processed_and_answers_questions(page):
    upload(page, ROOT / "modeling_prismer/assets/shape.png")
    wait_for(page, "Ready")
    for name in ("edge", "ocr"):
        assert page.locator(f"#card-{name} img").count() == 1
        assert " s" in page.inner_text(f"#card-{name} .card-head")
    ask(page, "What color is the shape?")
    assert page.locator("#chat").inner_text().strip().endswith("teal")
    ask(page, SHAPE)
    assert "triangle" in page.inner_text("#chat") and "teal" in page.inner_text("#chat")
    assert page.locator("#result .version").count() == 2
    assert page.locator("#looked img").count() == 3


PASTE = """async (data) => {
    const image = await (await fetch('data:image/png;base64,' + data)).blob();
    await navigator.clipboard.write([new ClipboardItem({'image/png': image})]);
}"""


def test_image_can_be_pasted(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    image = (ROOT / "modeling_prismer/assets/shape.png").read_bytes()
    page.evaluate(PASTE, base64.b64encode(image).decode())
    page.click("#image button[aria-label='Paste from clipboard']")
    wait_for(page, "Ready")
    ask(page, "What color is the shape?")
    assert page.locator("#chat").inner_text().strip().endswith("teal")


def test_image_can_come_from_the_camera(page):
    page.context.grant_permissions(["camera"])
    page.click("#image button[aria-label='Capture from camera']")
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("() => document.querySelector('#image video')?.videoWidth > 0")
    page.click("#image button[aria-label='capture photo']")
    wait_for(page, "Ready")
    assert page.locator("#card-edge img").count() == 1


def test_broken_image_gets_a_message_and_the_page_still_works(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((ROOT / "modeling_prismer/assets/shape.png").read_bytes()[:70])
    upload(page, broken)
    page.wait_for_selector(".toast-body")
    said = page.inner_text(".toast-body")
    assert "not an image, or damaged" in said and "/" not in said
    choose_example(page)


def test_too_large_file_is_refused(page, tmp_path):
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(11 * 1024**2))
    upload(page, large)
    page.wait_for_selector(".toast-body")
    assert str(tmp_path) not in page.content()


def named_file(name, content=b"no image"):
    return {"name": name, "mimeType": "image/png" if name.endswith("png") else "text/plain", "buffer": content}


DROP = """() => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File(["no image"], "<img src=x>.txt", {type: "text/plain"}));
    const place = document.querySelector("#image input[type=file]").parentElement;
    place.dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer}));
}"""
MARKUP = "<img src=x>"


def has_markup(page):
    return page.locator("img[src=x]").count() > 0


def test_page_shows_text_of_visitors_without_markup(page):
    shape = (ROOT / "modeling_prismer/assets/shape.png").read_bytes()
    page.set_input_files("#image input[type=file]", named_file(f"{MARKUP}.png", shape))
    wait_for(page, "Ready")
    ask(page, f"{MARKUP}?")
    assert f"{MARKUP}?" in page.inner_text("#chat") and not has_markup(page)
    page.click("#edit-ocr")
    page.click("button:has-text('Add a word')")
    page.fill(".editor-items input >> nth=-1", MARKUP)
    wait_for(page, MARKUP, "#card-ocr")
    assert not has_markup(page)
    page.get_by_role("tab", name="Classify").click()
    page.get_by_label("Your labels").fill(f"{MARKUP}, b")
    page.click("#rank")
    wait_for(page, MARKUP, "#ranking")
    page.get_by_label("Your labels").fill(f"{MARKUP * 9}, b")
    page.click("#rank")
    page.wait_for_selector(".toast-body")
    assert MARKUP in page.inner_text(".toast-body") and not has_markup(page)


@pytest.mark.parametrize("way", ["chosen", "dropped"])
def test_page_shows_file_names_without_markup(page, way):
    page.wait_for_selector("html[data-file-names=checked]", state="attached")
    if way == "chosen":
        page.set_input_files("#image input[type=file]", named_file(f"{MARKUP}.txt"))
    else:
        page.evaluate(DROP)
    page.wait_for_selector(".toast-body")
    assert "_img src=x_.txt" in page.inner_text(".toast-body") and not has_markup(page)


@pytest.fixture
def slow_experts(reader, monkeypatch):
    look = type(reader).look

    def slowly(self, image):
        for seen in look(self, image):
            time.sleep(1.5)
            yield seen

    monkeypatch.setattr(type(reader), "look", slowly)


def test_stop_ends_after_the_running_expert(page, slow_experts):
    assert not page.is_visible("#stop")
    upload(page, ROOT / "modeling_prismer/assets/shape.png")
    wait_for(page, "expert 1 of 2")
    page.click("#stop")
    wait_for(page, "Stopped.")
    assert not page.is_visible("#stop")
    page.wait_for_timeout(4000)  # the time that the other expert would take
    assert page.locator("#card-edge img").count() == 1 and page.locator("#card-ocr img").count() == 0
    assert "Stopped." in page.inner_text("#status") and "Error" not in page.inner_text("body")
    ask(page, "What color is the shape?")
    assert page.locator("#chat").inner_text().strip().endswith("teal")


def test_removed_image_leaves_no_output(page, slow_experts):
    upload(page, ROOT / "modeling_prismer/assets/shape.png")
    wait_for(page, "expert 1 of 2")
    page.click("#image button[aria-label='Remove Image']")
    page.wait_for_timeout(4000)
    assert page.locator("#card-edge img").count() == 0 and page.inner_text("#status").strip() == ""
    assert "Error" not in page.inner_text("body")


def test_too_long_question_gets_a_message(page):
    choose_example(page)
    page.fill("#question textarea, #question input", "is it red and " * 20)
    page.click("#ask")
    page.wait_for_selector(".toast-body")
    assert "too long" in page.inner_text(".toast-body")


def click_image(page, x, y):
    """Clicks on a place of the image, between 0 and 1. Small images are not enlarged to the element's size."""
    page.wait_for_function("() => document.querySelector('#image img')?.naturalWidth > 0")
    image = page.locator("#image img").first
    box, sizes = image.bounding_box(), image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    scale = min(1, box["width"] / sizes[0], box["height"] / sizes[1])
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.click(*(at + (part - 0.5) * scale * size for at, part, size in zip(middle, (x, y), sizes)))


def test_click_on_the_image_shows_what_is_there(page, monkeypatch):
    from suggestions import Examples, Thing

    things = [Thing("shape", (0.2, 0.2, 0.8, 0.8)), Thing("frame", (0, 0, 1, 1))]
    monkeypatch.setattr("page.find_things", lambda reader, labels: things)
    monkeypatch.setattr(Examples, "questions_about", lambda self, name, number: [f"What color is the {name}?"])
    choose_example(page)
    click_image(page, 0.5, 0.6)
    wait_for(page, "What color is the shape?", "#pointed")
    assert page.locator("#pointed img").get_attribute("alt")
    click_image(page, 0.1, 0.9)
    wait_for(page, "What color is the frame?", "#pointed")
    page.click("#pointed button")
    wait_for(page, "What color is the frame?", "#chat")
    wait_for(page, "Done.")


def test_another_checkpoint_answers_beside_this_one(page):
    choose_example(page)
    assert not page.is_visible("#compared")
    page.click("#other input")
    page.get_by_role("option", name="a-copy").click()
    ask(page, SHAPE)
    wait_for(page, "Done.")
    wait_for(page, "a-copy", "#compared")
    shown = page.inner_text("#compared").replace("a-copy", "prismer-easy-vqa")
    shown = shown.replace("its own experts", "their unchanged output")
    assert shown == page.inner_text("#result")  # it is the same checkpoint
    left, right = (page.locator(place).bounding_box() for place in ("#result", "#compared"))
    assert left["y"] == right["y"] and right["x"] > left["x"]
    page.click("#other input")
    page.get_by_role("option", name="no other checkpoint").click()
    page.wait_for_selector("#compared", state="hidden")


def test_off_and_noise_change_only_the_visitors_answer(page):
    choose_example(page)
    ask(page, SHAPE)
    seen = page.inner_text("#result .version >> nth=0")
    for name in ("edge", "ocr"):
        page.click(f"#switch-{name} label:has-text('Off')")
        wait_for(page, f"{'Edges' if name == 'edge' else 'Text'}".lower() + " off", "#result")
        wait_for(page, "Done.")
    assert "Switched off" in page.inner_text("#card-edge")
    versions = [page.locator("#result .version").nth(number).inner_text() for number in range(3)]
    assert versions[0] == seen
    chance = [each.split("\n")[-1] for each in versions]
    assert chance[1] == chance[2]  # all experts off gives the same result as no experts
    page.wait_for_selector("#effect-ocr b")
    effect = page.inner_text("#effect-ocr")
    assert "now triangle" in effect and "with all experts triangle" in effect
    assert page.inner_text("#effect-edge").strip() == ""
    page.click("#switch-edge label:has-text('Noise')")
    wait_for(page, "edges noise", "#result")
    page.click("#restore")
    page.wait_for_function("() => document.querySelectorAll('#result .version').length === 2")


def test_edited_word_and_painted_map_reach_the_model(page):
    choose_example(page)
    ask(page, SHAPE)
    page.click("#edit-edge")
    page.wait_for_selector(".editor-tools select")
    box = page.locator(".editor canvas").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 160, steps=6)
    page.mouse.up()
    wait_for(page, "edited by you", "#card-edge")
    wait_for(page, "edges changed", "#result")
    assert page.locator("#switch-edge input:checked").get_attribute("value") == "edited"
    page.click("#edit-ocr")
    page.wait_for_selector("button:has-text('Add a word')")
    page.click("button:has-text('Add a word')")
    page.fill(".editor-items input >> nth=-1", "circle")
    wait_for(page, "circle", "#card-ocr")
    wait_for(page, "text changed", "#result")


def test_editor_works_with_the_keyboard(page):
    choose_example(page)
    page.focus("#edit-edge")
    page.keyboard.press("Enter")
    page.wait_for_selector(".editor-tools select")
    page.wait_for_function("() => document.activeElement.tagName === 'CANVAS'")
    for key in ("ArrowRight", "ArrowDown", "Space", "Shift+ArrowRight"):
        page.keyboard.press(key)
    wait_for(page, "edited by you", "#card-edge")


def test_example_and_answer_need_no_mouse(page):
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.closest('#examples') !== null"):
            break
    page.keyboard.press("Enter")
    wait_for(page, "Ready")
    page.focus("#question textarea, #question input")
    page.keyboard.type(SHAPE)
    page.keyboard.press("Enter")
    wait_for(page, "triangle", "#result")
    wait_for(page, "Done.")
    page.focus("#switch-edge input[value=off]")
    page.keyboard.press("Space")
    wait_for(page, "edges off", "#result")


def test_link_restores_the_session_in_another_browser(browser, page):
    choose_example(page)
    ask(page, SHAPE)
    page.click("#switch-edge label:has-text('Off')")
    wait_for(page, "edges off", "#result")
    page.click("#share")
    page.wait_for_function("() => document.querySelector('#link textarea, #link input')?.value.startsWith('http')")
    link = page.input_value("#link textarea, #link input")
    other = browser.new_context().new_page()
    other.set_default_timeout(WAIT)
    other.goto(link)
    wait_for(other, "edges off", "#result")
    assert SHAPE in other.inner_text("#chat")
    other.context.close()


def test_classify_tab_ranks_labels(page):
    page.get_by_role("tab", name="Classify").click()
    page.click("#rank")
    page.wait_for_selector(".toast-body")
    assert "choose an image first" in page.inner_text(".toast-body")
    page.get_by_role("tab", name="Ask").click()
    choose_example(page)
    page.get_by_role("tab", name="Classify").click()
    assert page.input_value("#labels textarea, #labels input") == "circle, rectangle, triangle"
    page.click("#rank")
    page.wait_for_selector("#ranking .ranking")
    assert page.inner_text("#ranking .ranking li >> nth=0").startswith("triangle")


def test_study_tab_shows_each_figure_with_its_finding(page):
    from page import FINDINGS

    page.get_by_role("tab", name="Study").click()
    page.wait_for_selector("figure.study")
    aid, figure = page.locator("#reading-aid").bounding_box(), page.locator("figure.study").first.bounding_box()
    assert "How to read the figures" in page.inner_text("#reading-aid") and aid["y"] < figure["y"]
    captions = page.locator("figure.study figcaption").all_inner_texts()
    assert captions == list(FINDINGS.values()) and page.locator("figure.study img").count() == len(captions)
    assert {path.stem for path in (ROOT / "docs/study").glob("*.png")} == set(FINDINGS)


def test_new_image_replaces_the_previous_one(page):
    choose_example(page)
    ask(page, SHAPE)
    page.click("#switch-edge label:has-text('Off')")
    wait_for(page, "edges off", "#result")
    upload(page, ROOT / "spaces_demo/examples/scene-104.png")
    page.wait_for_function("() => document.querySelector('#result').innerText.trim() === ''")
    wait_for(page, "Ready")
    assert page.locator("#switch-edge input:checked").get_attribute("value") == "seen"
    assert SHAPE not in page.inner_text("#chat")


COVERED = """() => {
    const covered = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode, parent = node.parentElement;
        const isVisible = parent.checkVisibility({visibilityProperty: true, opacityProperty: true})
            && !parent.closest("[class*=visually-hidden]") && getComputedStyle(parent).pointerEvents !== "none";
        if (!node.textContent.trim() || !isVisible) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const box = range.getClientRects()[0];
        if (!box || box.width < 2 || box.bottom < 0 || box.top > innerHeight) continue;
        const x = box.left + box.width / 2, y = box.top + box.height / 2;
        const top = y > 0 && y < innerHeight ? document.elementFromPoint(x, y) : null;
        if (top && !parent.contains(top) && !top.contains(parent)) covered.push(node.textContent.trim());
    }
    return covered;
}"""


def test_phone_shows_the_answer_and_covers_no_text(browser, server):
    page = open_page(browser, server, PHONE)
    choose_example(page)
    page.evaluate("() => scrollTo(0, 0)")
    ask(page, SHAPE)
    answer = page.locator("#chat").bounding_box()
    assert 0 <= answer["y"] and answer["y"] + answer["height"] <= PHONE["height"]
    height = page.evaluate("() => document.documentElement.scrollHeight")
    for top in range(0, height, PHONE["height"] // 2):
        page.evaluate("(top) => scrollTo(0, top)", top)
        page.wait_for_timeout(100)
        assert page.evaluate(COVERED) == []
    page.context.close()


def test_cards_have_equal_heights_and_aligned_parts(page):
    choose_example(page)
    for part in (".expert", ".expert .card img", ".expert [id^=switch-]", ".expert button"):
        boxes = [each.bounding_box() for each in page.locator(part).all() if each.is_visible()]
        assert len(boxes) >= 2 and len({(round(box["y"]), round(box["height"])) for box in boxes}) == 1, part


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_accessible_and_fits_the_screen(browser, server, viewport, dark):
    if not AXE.is_file():
        pytest.skip(f"no axe-core at {AXE}: npm install --prefix build/axe axe-core")
    page = open_page(browser, server, viewport, dark)
    choose_example(page)
    ask(page, SHAPE)
    page.click("#switch-ocr label:has-text('Off')")
    page.click("#edit-edge")
    page.wait_for_selector(".editor-tools select")
    wait_for(page, "text off", "#result")
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for tab in ("Ask", "Classify", "Study", "API"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(400)
        found = page.evaluate("() => axe.run(document, {runOnly: ['wcag2a', 'wcag2aa']})")["violations"]
        serious = {
            (each["id"], node["html"][:200])
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        }
        assert not serious - GRADIO_OWN, tab
    page.context.close()
