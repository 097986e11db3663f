"""tools/space.py and tools/hf/app.py: the folder of a Space, and its page in a browser, without a network."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sample
import space
from chromium import requests
from huggingface_hub import SpaceCard

TOOLS = Path(space.__file__).parent
APP = TOOLS / "hf" / "app.py"
MAX_TOKENS = 1000


# --- The folder ---


def run(*command: object, **settings: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """An artifact, as people export it."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip('pip install "transformers>=5" to export a model')
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    done = run(TOOLS / "export_hf.py", trained.run_folder, folder, "--licence", "mit")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def made(exported, tmp_path_factory) -> Path:
    """A Space with that model."""
    folder = tmp_path_factory.mktemp("made") / "page"
    space.main([str(exported), str(folder), "--model", "me/tiny"])
    return folder


@pytest.mark.slow
def test_space_has_its_settings_the_app_and_the_whole_model(exported, made):
    settings = SpaceCard.load(made / "README.md").data
    assert settings.title == "tiny"
    assert settings.sdk == "gradio"
    assert settings.license == "mit"
    assert settings.models == ["me/tiny"]
    assert (made / settings.app_file).read_text() == APP.read_text()

    copies = {file.name: file.read_bytes() for file in (made / "model").iterdir()}
    assert copies == {file.name: file.read_bytes() for file in exported.iterdir() if file.is_file()}


def test_folder_without_a_model_or_space_that_exists_is_an_error_with_a_remedy(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(SystemExit, match=r"model has no config.json: name a folder that tools/export_hf.py wrote"):
        space.main([str(model), str(tmp_path / "space")])
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("# A model\n")
    with pytest.raises(SystemExit, match=r"exists already: name another folder, or remove it"):
        space.main([str(model), str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_app_without_its_packages_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('there is no gradio')\n")
    done = run(APP, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: app.py needs gradio and transformers (there is no gradio): pip install ")
    assert done.stderr.count("\n") == 1


# --- The page ---


class Page(NamedTuple):
    """The page in a browser."""

    browser: Any

    def wait_for(self, condition: Any) -> Any:
        wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(self.browser, 60, poll_frequency=0.02)
        return wait.until(lambda browser: condition())

    def button(self, name: str) -> Any:
        return self.browser.find_element("xpath", f"//button[normalize-space()='{name}']")

    def enter(self, element: Any, text: str) -> None:
        """Type in place of what stands there."""
        keys = pytest.importorskip("selenium.webdriver").Keys
        element.send_keys(keys.CONTROL, "a")
        element.send_keys(text, keys.TAB)

    def set(self, **values: float) -> None:
        for label, value in values.items():
            name = label.replace("_", "-")
            selector = f'input[aria-label="number input for {name}"], input[aria-label="{name}"]'
            self.enter(self.browser.find_element("css selector", selector), str(value))

    @property
    def text(self) -> str:
        return self.browser.find_elements("css selector", "textarea")[1].get_property("value")

    @property
    def remark(self) -> str:
        """What stands below the text, such as "12 tokens, 100 per second: the document ends here"."""
        found = re.search(r"^\d+ tokens, .*$", self.browser.find_element("css selector", "body").text, re.M)
        return found[0] if found else ""

    def generate(self, prompt: str) -> list[str]:
        """Press the button, and return all texts that were seen until the last one."""
        self.enter(self.browser.find_element("css selector", "textarea"), prompt)
        self.browser.execute_script(
            "const text = document.querySelectorAll('textarea')[1];"
            "window.seen = []; clearInterval(window.looking);"
            "window.looking = setInterval(() => window.seen.push(text.value), 5)"
        )
        before = self.remark
        self.button("Generate").click()
        self.wait_for(lambda: ": " in self.remark and self.remark != before)
        last = self.settled_text()
        seen = self.browser.execute_script("return window.seen")
        return [*dict.fromkeys(seen), last]

    def settled_text(self) -> str:
        """The text once it no longer changes: the page may draw it a little later than the remark."""
        while True:
            text = self.text
            time.sleep(0.5)
            if self.text == text:
                return text

    def stop_soon(self) -> None:
        """Press the button, and the other one when the first text is seen."""
        self.browser.execute_async_script(
            "const [generate, stop, done] = arguments;"
            "const text = document.querySelectorAll('textarea')[1];"
            "const before = text.value;"
            "const look = () => {"
            "  if (text.value === before) setTimeout(look, 5);"
            "  else { stop.click(); done(); }"
            "};"
            "generate.click(); look();",
            self.button("Generate"),
            self.button("Stop"),
        )


@pytest.fixture(scope="module")
def address(made, tmp_path_factory) -> Iterator[str]:
    """The app, in a process that would come out at a proxy of ours if it asked for anything on the network."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("pip install gradio to run the page")
    proxy = socket.create_server(("127.0.0.1", 0))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("home")
    proxies = {
        name: f"http://127.0.0.1:{proxy.getsockname()[1]}" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    }
    env = os.environ | proxies | {"NO_PROXY": "127.0.0.1,localhost", "HOME": str(home)}
    log = home / "log.txt"
    with log.open("w") as output:
        app = subprocess.Popen(
            [sys.executable, str(made / "app.py"), "--port", str(port)], env=env, stdout=output, stderr=output
        )
        try:
            wait_for_server(app, port, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            app.terminate()
            app.wait(20)

    assert "Traceback" not in log.read_text()
    proxy.setblocking(False)
    with proxy, pytest.raises(BlockingIOError):
        proxy.accept()


def wait_for_server(app: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        assert app.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


@pytest.fixture
def opened(address, browser) -> Page:
    browser.get(address)
    page = Page(browser)
    page.wait_for(lambda: browser.find_elements("xpath", "//button[normalize-space()='Generate']"))
    return page


@pytest.mark.slow
def test_card_and_curves_are_shown_without_a_network(opened):
    browser = opened.browser
    assert browser.find_element("css selector", "h1").text == "tiny"
    # Of the front matter nothing is left.
    assert "library_name" not in browser.find_element("css selector", "body").text
    [curve] = browser.find_elements("css selector", 'img[alt="loss of training and validation"]')
    assert opened.wait_for(lambda: curve.get_property("naturalWidth")) > 100
    assert [url for url in requests(browser) if not url.startswith("http://127.0.0.1:")] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def said(capsys, artifact: Path, prompt: str, *options: object) -> str:
    """The same by the other tool."""
    assert sample.main([str(artifact), prompt, *map(str, options)]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.slow
def test_text_is_that_of_the_other_tool_for_every_setting(opened, trained, capsys):
    """Beyond the model's window of 32 tokens too. High temperatures are left out: they bring bytes that are no text."""
    first = opened.generate("the cat")[-1]
    assert first == said(capsys, trained.artifact, "the cat", "--max-tokens", 200)
    opened.set(Seed=7, Temperature=0.5)
    second = opened.generate("the cat")[-1]
    assert second == said(capsys, trained.artifact, "the cat", "--seed", 7, "--temperature", 0.5)
    opened.set(Temperature=1, Top_p=0.5, Min_p=0.1, Tokens=60)
    third = opened.generate("a dog  and")[-1]
    options = ["--seed", 7, "--temperature", 1, "--top-p", 0.5, "--min-p", 0.1, "--max-tokens", 60]
    assert third == said(capsys, trained.artifact, "a dog  and", *options)

    opened.set(Seed=1337, Temperature=0.8, Top_p=0.95, Min_p=0, Tokens=200)
    assert opened.generate("the cat")[-1] == first
    assert len({first, second, third}) == 3


@pytest.mark.slow
def test_text_grows_and_stops_when_the_reader_says_so(opened):
    # The most likely token is never the end of the document, so that this goes on to the end that is asked for.
    opened.set(Temperature=0, Tokens=MAX_TOKENS)
    seen = [text for text in opened.generate("the cat") if text.startswith("the cat")]
    assert opened.remark.startswith(f"{MAX_TOKENS} tokens, ")
    assert len(seen) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))

    opened.stop_soon()
    stopped = opened.settled_text()
    assert ": " not in opened.remark
    assert len("the cat") < len(stopped) < len(seen[-1]) / 2
    assert seen[-1].startswith(stopped)
    # The next one need not wait for it.
    opened.set(Tokens=5)
    opened.generate("the cat")
    assert opened.remark.startswith("5 tokens, ")
