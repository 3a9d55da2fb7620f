"""The page of `speed trace --html` in headless Chromium: every panel, mouse, keyboard, address, phone, dark, print.

    make test-page      # installs Debian's chromium where it is missing, and playwright in a virtual environment

The page's numbers are compared with the data that `-o json` writes, read here by a decoder of its own, with those of
`speed plan`, and with what `speed generate` says. A page made of hostile text must show it and run nothing.
"""

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SPEED = os.environ.get("SPEED", str(ROOT / "speed"))
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
MODEL = ROOT / "models" / "small.safetensors"
STORY = (ROOT / "tests" / "page" / "story.txt").read_text().strip()
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><!-- ]]> "
    "\"'`${window.hacked = 3} \\u003c/script> &lt;b&gt; \u202egnp.exe\u202c \u2066x \u2028 \u2029 "
    "\u0001\u001b[31m \u200b\u05e9\u05dc\u05d5\u05dd"
    " \U0001f600 javascript:alert(1) /*data*/ /*page.js*/"
)


def speed(*arguments):
    return subprocess.run([SPEED, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def make_page(folder, name, *arguments):
    path = Path(folder) / name
    document = json.loads(speed("trace", "--html", path, "-o", "json", *arguments))
    return path, document


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path, cls.document = make_page(cls.folder.name, "small.html", "-m", MODEL, "--chat", "-p", STORY)
        cls.playwright = sync_playwright().start()
        cls.browser = cls.playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

    @classmethod
    def tearDownClass(cls):
        cls.browser.close()
        cls.playwright.stop()
        cls.folder.cleanup()

    def open(self, fragment="", path=None, width=1280, height=800, scheme="light", **context):
        context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **context)
        self.addCleanup(context.close)
        page = context.new_page()
        self.requests, self.errors = [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("dialog", lambda dialog: self.errors.append("dialog: " + dialog.message))
        page.goto((path or self.path).as_uri() + fragment)
        page.wait_for_selector("#grid svg")
        return page

    def clean(self, page):
        """Nothing failed, and nothing was asked of the network."""
        self.assertEqual(self.errors, [])
        self.assertEqual([url for url in self.requests if not url.startswith("file:")], [])
        self.assertEqual(len(self.requests), 1)
        self.assertIsNone(page.evaluate("window.hacked ?? null"))

    def state(self, page):
        return dict(re.findall(r"(\w+)=([^&]*)", page.evaluate("location.hash")))

    # ---- panels ----

    def test_all_nine_panels_are_there(self):
        page = self.open("#stop=3")
        for panel in (
            "#bet",
            "#grid svg",
            "#text span",
            "#stops button",
            "#looks svg",
            "#saves .card",
            "#would svg",
            "#answers tr",
        ):
            self.assertGreater(page.locator(panel).count(), 0, panel)
        self.assertEqual(page.locator("#stops button").count(), 5)
        self.assertEqual(page.locator("#saves .card").count(), 3)
        self.assertEqual(page.locator("#text span").count(), len(self.document["tokens"]))
        # Beside the grid: a number, a bar, a word and a lens for each layer.
        words = page.locator("#grid svg text").all_text_contents()
        self.assertGreaterEqual(sum("·h" in word for word in words), self.document["model"]["shape"]["n_layers"])
        self.clean(page)

    def test_a_reader_lands_on_stop_three(self):
        page = self.open()
        self.assertTrue(page.locator("body").evaluate("b => b.classList.contains('covered')"))
        self.assertFalse(page.locator("#story").is_visible())
        self.assertEqual(page.locator("#k-text").inner_text(), "K = 4 of 8")
        page.locator("#bet-choices button", has_text="just show me").click()
        story = page.locator("#story").inner_text()
        for words in ("At K = 4 it says", "A ring.", "Layer 4", "head 0", "camera", "weight 1.00"):
            self.assertIn(words, story)
        self.assertEqual(page.locator("[aria-current=step]").inner_text(), "3 One layer less")
        self.clean(page)

    def test_scrolling_past_the_bet_skips_it(self):
        page = self.open()
        page.mouse.wheel(0, 2000)
        page.wait_for_selector("body:not(.covered)")
        self.assertIn("A ring.", page.locator("#story").inner_text())

    def test_a_bet_is_answered(self):
        for k, words in (("5", "you are right"), ("3", "You bet K = 3.")):
            page = self.open()
            page.locator("#bet-choices button", has_text=re.compile(f"^{k}$")).click()
            self.assertIn(words, page.locator("#bet").inner_text())
            self.assertIn("K = 5 is the lowest", page.locator("#bet").inner_text())

    def test_the_stops_say_what_the_runs_say(self):
        page = self.open()
        runs = {(r["policy"], r["k"], r["bos"]): r for r in self.document["runs"]}
        for key, (policy, k, bos) in {
            "2": ("speed", 5, True),
            "3": ("speed", 4, True),
            "4": ("speed", 5, False),
            "5": ("pop", 4, None),
        }.items():
            page.keyboard.press(key)
            run = runs[policy, k, bos]
            self.assertEqual(page.locator("#says").inner_text().strip("\u2068\u2069"), run["text"])
            self.assertEqual(self.state(page)["stop"], key)
        page.keyboard.press("1")
        self.assertIn("K = 8 of 8", page.locator("#k-text").inner_text())
        self.clean(page)

    def test_every_k_says_what_generate_says(self):
        page = self.open("#stop=3")
        for row in page.locator("#answers tbody tr").all():
            ks, said = row.locator("td").nth(0).inner_text(), row.locator("td").nth(1).inner_text()
            numbers = [int(n) for n in re.findall(r"\d+", ks)]
            for k in range(numbers[0], numbers[-1] + 1):
                text = speed("generate", "-m", MODEL, "--chat", "-p", STORY, "-n", 16, "--k", k).strip()
                self.assertEqual(re.sub("[\u2068\u2069]", "", said), text)

    # ---- numbers ----

    def test_dots_are_the_attention_of_the_data(self):
        """Of the chosen token: one dot for each slot with a weight of 0.02 or more, hollow where there is no slot."""
        d, full = self.document, self.document["full"]
        run = next(r for r in d["runs"] if (r["policy"], r["k"], r["bos"]) == ("speed", 4, True))
        token, L, split = 91, d["model"]["shape"]["n_layers"], d["split"]

        def looks(run, wanted):
            """{position: weight} of the token in this layer."""
            raw, at = base64.b64decode(run["attention"]), 0
            for layer in range(run["from"], L):
                whole = run is full and layer < full["prompt_layers"]
                for row in range(0 if whole else run["split"], len(d["tokens"])):
                    seen = range(row + 1) if run is full else [0, *range(split, row + 1)]
                    if (layer, row) == (wanted, token):
                        return {position: (raw[at + 2 * i] / 255) ** 2 for i, position in enumerate(seen)}
                    at += 2 * len(seen)

        solid, hollow = 0, 0
        for layer in range(L):
            ideal = looks(full, layer)
            seen = ideal if layer < 4 else looks(run, layer)
            solid += sum(w >= 0.02 for w in seen.values())
            hollow += sum(w >= 0.02 for i, w in ideal.items() if i not in seen)
        page = self.open("#k=4&policy=speed&bos=1&token=91&layer=4")
        circles = page.locator("#grid svg circle")
        styles = [c.get_attribute("style") for c in circles.all()]
        self.assertEqual(sum("fill:none" in s for s in styles), hollow)
        self.assertEqual(sum("fill:none" not in s for s in styles), solid)
        self.assertGreater(hollow, 10)

    def test_a_header_token_has_position_90_and_slot_4(self):
        page = self.open("#k=5&policy=speed&bos=1&token=90&layer=6")
        where = page.locator("#where").inner_text()
        self.assertIn("position 90", where)
        self.assertIn("slot 90 below the line, slot 4 above it", where)
        self.assertIn(
            "slot 3 above it", self.open("#k=5&policy=speed&bos=0&token=90&layer=6").locator("#where").inner_text()
        )
        self.assertIn(
            "slot 90 in every layer", self.open("#k=5&policy=pop&token=90&layer=6").locator("#where").inner_text()
        )

    def test_what_it_saves_is_what_was_counted(self):
        counted = [
            row
            for row in json.loads(speed("trace", "-m", MODEL, "--chat", "-p", STORY, "--k", 5, "-o", "json"))["rows"]
            if row["layer"] == "all"
        ]
        page = self.open("#k=5&policy=speed&bos=1&token=90&layer=4")
        saves = page.locator("#saves").inner_text().replace("\u202f", "")
        for text in ("59.7 %", "64.6 %", str(counted[0]["flops"]), str(counted[0]["kv_bytes"]), "161247232", "240640"):
            self.assertIn(text, saves)
        self.assertNotIn("≠", saves)
        page.locator("#by-hand summary").click()
        for k in range(1, 9):  # by hand, too, at every K and under every policy
            for policy in ("speed&bos=1", "speed&bos=0", "pop"):
                page = self.open(f"#k={k}&policy={policy}&token=90&layer=4")
                text = page.locator("#by-hand-text").text_content()
                self.assertEqual(text.count("= counted"), 3, (k, policy))
                self.assertNotIn("≠", text)

    def test_what_it_would_save_is_what_plan_says(self):
        page = self.open()
        for shape, policy, k, bos, n in [
            ("llama-3.1-8b", "speed", 24, True, 131072),
            ("llama-3.1-8b", "pop", 22, True, 1024),
            ("llama-3.2-1b", "speed", 7, False, 300),
            ("llama-3.1-70b", "speed", 1, True, 64),
            ("llama-3.2-3b", "pop", 27, True, 5000),
        ]:
            flags = ["--shape", shape, "--policy", policy, "--k", k, "--ctx", n, "-n", 0] + ["--no-bos"] * (not bos)
            row = json.loads(speed("plan", "--json", *flags))["rows"][1]
            name = shape.replace("llama", "Llama").replace("b", "B")
            own = page.evaluate("(all) => speedPlan(...all)", [name, policy, k, bos, n])
            for key in ("prefill_flops", "kv_bytes", "weight_bytes"):
                self.assertEqual(own[key], row[key], (shape, policy, k, key))
        note = page.locator("#would-note").inner_text()
        self.assertIn("allow 1.15 for one request", note)
        self.assertIn("1.22 from 2.3 requests on", note)

    # ---- what the reader does ----

    def test_the_line_is_dragged(self):
        page = self.open("#stop=3")
        pill = page.locator("#grid .pill").bounding_box()
        x, y = pill["x"] + pill["width"] / 2, pill["y"] + pill["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 200, y - 62, steps=6)  # two layers up
        page.mouse.up()
        self.assertEqual(self.state(page)["k"], "6")
        self.assertEqual(page.locator("#says").inner_text().strip("\u2068\u2069"), "A camera.")
        self.clean(page)

    def test_slider_switches_and_pointing(self):
        page = self.open("#stop=3")
        page.locator("#k").fill("1")  # the second K of the list
        self.assertEqual(self.state(page)["k"], "2")
        page.locator("#methods button", has_text="POP").click()
        self.assertEqual(self.state(page)["policy"], "pop")
        self.assertTrue(page.locator("#anchor").is_disabled())
        page.locator("#methods button", has_text="SPEED").click()
        page.locator("#anchor").click()
        self.assertEqual(self.state(page)["bos"], "0")
        page.locator("#text span").nth(88).click()
        self.assertEqual(self.state(page)["token"], "88")
        page.evaluate("scrollTo(0, 0)")
        box = page.locator("#grid svg").bounding_box()
        page.mouse.click(box["x"] + 400, box["y"] + 60)
        self.assertEqual(self.state(page)["layer"], "7")
        self.clean(page)

    def test_keyboard_alone(self):
        page = self.open("#stop=3")
        page.locator("#grid").focus()
        for key, name, value in [
            ("ArrowUp", "k", "5"),
            ("ArrowDown", "k", "4"),
            ("ArrowRight", "token", "92"),
            ("ArrowLeft", "token", "91"),
            ("PageUp", "layer", "5"),
            ("PageDown", "layer", "4"),
            ("b", "bos", "0"),
            ("m", "policy", "pop"),
            ("Home", "token", "0"),
            ("End", "token", "93"),
            ("3", "stop", "3"),
        ]:
            page.keyboard.press(key)
            self.assertEqual(self.state(page)[name], value, key)
        self.clean(page)

    def test_play(self):
        page = self.open("#stop=2")
        page.keyboard.press("p")
        self.assertEqual(page.locator("#play").inner_text(), "■ stop")
        page.locator("#play", has_text="play").wait_for(timeout=15000)
        self.assertEqual(page.locator("#says").inner_text().strip("\u2068\u2069"), "A camera.")
        self.clean(page)

    def test_the_view_is_in_the_address(self):
        page = self.open("#k=3&policy=speed&bos=0&token=89&layer=2")
        self.assertEqual(page.locator("#k-text").inner_text(), "K = 3 of 8")
        self.assertEqual(page.locator("#anchor").inner_text(), "anchor off")
        self.assertIn("position 89", page.locator("#where").inner_text())
        for wrong in ("#k=99&token=-1&layer=x", "#stop=77", "#k=&policy=<b>", "#%00", "#k=4&k=5&token=1e9"):
            self.open(wrong)
            self.assertEqual(self.errors, [])

    # ---- where it is read ----

    def test_no_sideways_scroll_at_any_width(self):
        for width in (320, 390, 760, 761, 900, 1000, 1280, 1920):
            page = self.open("#stop=3", width=width)
            for stop in "12345":
                page.keyboard.press(stop)
                self.assertLessEqual(page.evaluate("document.documentElement.scrollWidth"), width, (width, stop))
        self.clean(page)

    def test_light_and_dark(self):
        paper = "getComputedStyle(document.body).backgroundColor"
        colours = [self.open("#stop=3", scheme=scheme).evaluate(paper) for scheme in ("light", "dark")]
        self.assertNotEqual(*colours)
        page = self.open("#stop=3")
        page.locator("#theme").click()
        self.assertEqual(page.evaluate(paper), colours[1])

    def test_paper(self):
        page = self.open()
        with tempfile.TemporaryDirectory() as folder:
            page.pdf(path=f"{folder}/page.pdf")
            self.assertGreater(Path(f"{folder}/page.pdf").stat().st_size, 20000)
            if subprocess.run(["which", "pdftotext"], capture_output=True).returncode == 0:
                text = subprocess.run(["pdftotext", f"{folder}/page.pdf", "-"], capture_output=True, text=True).stdout
                self.assertIn("A ring.", text)
        self.clean(page)

    def test_without_javascript_it_says_so(self):
        context = self.browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(self.path.as_uri())
        self.assertIn("JavaScript", page.locator("noscript").inner_text() or page.content())
        context.close()

    # ---- any model, any prompt ----

    def test_hostile_text_is_shown_and_runs_nothing(self):
        for number, flags in enumerate((["--chat"], [])):
            path, document = make_page(
                self.folder.name, f"hostile{number}.html", "-m", MODEL, "-n", 4, "--ks", "2,4", "-p", HOSTILE, *flags
            )
            self.assertEqual(document["prompt"], HOSTILE)
            page = self.open("#stop=1", path=path)
            for key in "12345bmp":
                page.keyboard.press(key)
            self.clean(page)
            text = page.locator("#text").inner_text()
            self.assertIn("‹202E›", text)
            self.assertNotIn("\u202e", page.locator("main").inner_text())
            self.assertEqual(page.locator("img, iframe, object, #data ~ script ~ script").count(), 0)

    def test_a_hostile_model_file_runs_nothing(self):
        """Tokens, the model's name and answers that are markup: the data of a page, changed as a model file could."""
        page_text = self.path.read_text()
        begin = page_text.index('id="data">') + len('id="data">')
        end = page_text.index("</script>", begin)
        document = json.loads(page_text[begin:end])
        document["tokens"] = [HOSTILE] * len(document["tokens"])
        document["words"] = [HOSTILE] * len(document["words"])
        document["model"]["name"] = document["program"] = HOSTILE
        for run in [document["full"], *document["runs"]]:
            run["text"] = HOSTILE
        escaped = json.dumps(document).replace("<", "\\u003c")
        path = Path(self.folder.name) / "model.html"
        path.write_text(page_text[:begin] + escaped + page_text[end:])
        page = self.open("#stop=3", path=path)
        for key in "12345bm":
            page.keyboard.press(key)
        self.clean(page)

    def test_other_requests(self):
        """Plain text, a split of one's own, one-token answers, other policies, long prompts, other models."""
        golden = ROOT / "tests" / "golden"
        for number, flags in enumerate([
            ["-m", MODEL, "-p", "The code word is"],
            ["-m", MODEL, "-p", "a", "-n", 1],
            ["-m", MODEL, "-p", STORY, "--split", 0, "-n", 2, "--ks", 4],
            ["-m", MODEL, "-p", STORY, "--split", 40, "-n", 3],
            ["-m", MODEL, "--chat", "-p", STORY, "--policy", "share", "--every", 2, "--ks", 5],
            ["-m", MODEL, "-p", STORY * 2, "-n", 3, "--ks", "3,5"],
            ["-m", golden / "scaled.safetensors", "-p", "The quick brown fox", "-n", 5],
            ["-m", golden / "swiftkv.safetensors", "-p", "The quick brown fox", "-n", 5, "--policy", "swiftkv"],
            ["-m", golden / "tied.safetensors", "-p", "grüße 你好 🎉 שלום", "-n", 5],
        ]):  # fmt: skip
            path, _ = make_page(self.folder.name, f"other{number}.html", *flags)
            page = self.open("", path=path)
            for key in ["1", "2", "3", "4", "5", "m", "m", "b", "m", "p", "p"]:
                page.keyboard.press(key)
            page.locator("#grid").focus()
            for key in ["ArrowUp", "ArrowDown", "Home", "ArrowRight", "End", "PageUp", "PageDown"]:
                page.keyboard.press(key)
            self.clean(page)
            self.assertNotIn("≠", page.locator("main").inner_text())
            self.assertNotIn("undefined", page.locator("main").inner_text())
            self.assertNotIn("NaN", page.locator("main").inner_html())


if __name__ == "__main__":
    unittest.main(verbosity=1 if len(sys.argv) > 1 else 2)
