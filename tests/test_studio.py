"""The studio: its functions, and the page in a browser, which talks to this machine alone."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import shlex
import shutil
import socket
import threading
import time
import types
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from launch.evaluation.sample_files import read_samples
from lightningdit_jax.store.space import label_of, labels_for
from vavae_jax.common.errors import InputError

pytest.importorskip("gradio", reason="the extra [studio] is not installed")

from launch.studio import between, compare, content, generate, page, reconstruct, space, training
from launch.studio.parts import opened

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
  *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
  *("disable-background-networking", "disable-component-update", "window-size=1280,1000"),
)
PATIENCE = 60  # seconds
NUM = 3


@pytest.fixture(scope="module")
def studio(pipeline):
  """A page's content, of the tiny pipeline."""
  return content.open_studio(str(pipeline / "diffusion"), num=NUM)


def test_the_noise_goes_along_an_arc():
  a, b = np.random.default_rng(0).normal(size=(2, 2, 2, 300)).astype(np.float32)
  way = between.spherical(a, 2 * b, np.linspace(0, 1, 5))
  assert np.allclose(way[0], a, atol=1e-5)
  assert np.allclose(way[-1], 2 * b, atol=1e-5)
  lengths = np.linalg.norm(way.reshape(5, -1), axis=1)
  assert np.allclose(np.diff(lengths), np.diff(lengths)[0], rtol=1e-3)  # a chord would sag
  assert np.allclose(between.spherical(a, a, np.array([0, 0.5, 1])), a)


def test_the_ways_ends_are_the_seeds_own_samples(studio):
  way = between.seeds(studio.pipe, 2, 5, 6, NUM)
  for place, seed in ((0, 5), (-1, 6)):
    own = studio.pipe.sample([2], seed=seed, progress=False)[0]
    assert np.abs(np.asarray(way[place], int) - np.asarray(own)).max() <= 1
  middle = between.on_the_way(studio.pipe, 2, 5, 6, 0.5, NUM)
  assert np.abs(np.asarray(middle[0], int) - np.asarray(way[NUM // 2])).max() <= 1


def test_the_command_and_the_python_give_the_pictures_of_the_page(studio, command, tmp_path):
  names = studio.classes
  chosen, controls = [names[4], names[1]], (2.5, 0.2, "heun", 4)
  *_, shown = generate.frames(studio, chosen, *controls, seed=3)
  shell, python = generate.command(studio, chosen, *controls, seed=3)
  found: dict = {}
  exec(python, found)
  assert found["pictures"] == shown
  program, name, *words = shlex.split(shell.replace("\\\n", ""))
  assert (program, name) == ("vavae", "sample")
  done = command("launch.sample", *words, f"--output={tmp_path / 'x.npz'}")
  assert done.returncode == 0, done.stderr
  drawn, _ = read_samples(tmp_path / "x.npz")
  assert np.abs(drawn.astype(int) - np.stack(shown)).max() <= 1


@pytest.mark.parametrize(
  ("names", "chosen"),
  [
    (("0", "1", "10", "2"), ["10", "2"]),  # a class that is called 2 comes before the number 2
    (("1", "2", "1,2", "balanced"), ["1", "2"]),
    (("balanced", "cat", 'a "wild", cat', " dog"), ["balanced"]),
    (("balanced", "cat", 'a "wild", cat', " dog"), ['a "wild", cat', " dog"]),
    ((), ["3", "1"]),
    (("0", "1", "10", "2"), []),
  ],
)
def test_the_command_and_the_python_draw_the_classes_of_the_page(studio, names, chosen):
  pipe = copy.copy(studio.pipe)
  config = ConfigDict(pipe.config)
  config.model.num_classes, pipe.class_names = 4, names
  pipe.config = FrozenConfigDict(config)
  studio = content.Studio("x", pipe, "of it's", num=NUM)
  shell, python = generate.command(studio, chosen, 2.5, 0.2, "heun", 4, seed=3)
  given = dict(word.split("=", 1) for word in shlex.split(shell.replace("\\\n", ""))[2:])
  drawn = labels_for(given["--labels"], NUM, 4, 0, names)
  assert drawn.tolist() == studio.labels(chosen)
  listed = ast.literal_eval(python.split("pipe.sample(\n  ")[1].split(",\n  seed")[0])
  assert [label_of(x, names, 4) for x in listed] == studio.labels(chosen)
  assert given["--tokenizer"] == "of it's"
  assert """Pipeline.load('x', tokenizer="of it's")""" in python


def test_no_control_but_the_solver_compiles(studio, caplog):
  content.warm_up(studio)
  solver = content.solver_of(studio.pipe)
  with jax.log_compiles():
    for guidance, interval, steps in ((2.5, 0.2, 4), (4.0, 0.0, 7), (1.0, 0.5, 3)):
      controls = (guidance, interval, solver, steps)
      list(generate.frames(studio, studio.classes[:1], *controls, seed=steps))
      between.seeds(studio.pipe, 1, 5, 6, NUM, **content.settings(*controls))
    assert "compil" not in caplog.text.lower()
    studio.pipe.noise(0, NUM + 1)
    assert "compil" in caplog.text.lower()  # it is told where there is some


def test_a_map_of_cells_is_coloured_by_what_varies():
  features = np.zeros((2, 3, 8))
  features[:, 1:] += np.arange(8)
  colours = reconstruct.pca_map(features).astype(int)
  assert np.ptp(colours[:, 0].reshape(-1, 3), axis=0).max() == 0
  assert np.ptp(colours[:, 1:].reshape(-1, 3), axis=0).max() == 0
  assert np.abs(colours[0, 0] - colours[0, 1]).max() == 255


def test_a_point_of_the_map_is_its_own_latent(studio):
  found = space.map_of(studio.store)
  latent = space.at(found, *found.places[7])
  assert np.allclose(latent, found.latents[7], atol=1e-3)
  assert space.nearest(found, latent, studio.store)[0] == 7


def test_two_averages_differ_on_the_same_noise(studio):
  other = compare.load(studio.source, ema=0.0)
  first, second = compare.compare(studio.pipe, other, [0, 1, 2], 4)
  assert first == studio.pipe.sample([0, 1, 2], seed=4, progress=False)
  assert second == other.sample([0, 1, 2], seed=4, progress=False) != first


def test_classes_are_compared_by_their_names(studio):
  def model(*names):
    def sample(classes, **_):
      return [names[label_of(x, names, 3)] if names else x for x in classes]

    noise = lambda seed, count: np.zeros((count, 1))  # noqa: E731
    return types.SimpleNamespace(class_names=names, noise=noise, sample=sample)

  first, other = model("cat", "dog", "7"), model("7", "cat", "dog")
  assert compare.compare(first, other, [2, 0], 0) == [["7", "cat"], ["7", "cat"]]
  assert compare.compare(first, model(), [2, 0], 0) == [["7", "cat"], [2, 0]]
  assert compare.compare(model(), other, [2, 0], 0) == [[2, 0], ["dog", "7"]]
  with pytest.raises(InputError, match="The other model has no class 'dog'; choose classes of"):
    compare.compare(first, model("7", "cat", "bird"), [2, 1], 0)


def test_the_other_average_of_a_model_has_the_tokenizer_that_was_named(studio, monkeypatch):
  asked = []
  monkeypatch.setattr(compare, "load", lambda *x, **options: asked.append((*x, options)))
  for second in (studio.source, "other"):
    compare.other(dataclasses.replace(studio, tokenizer="moved"), second, 0.5)
  expected = {studio.source: "moved", "other": ""}
  assert asked == [(x, {"tokenizer": y, "ema": 0.5}) for x, y in expected.items()]


def test_a_training_under_way_is_seen_to_change(pipeline, tmp_path):
  workdir = shutil.copytree(pipeline / "tokenizer", tmp_path / "run")
  before = training.state_of(workdir)
  assert "loss" in training.names_of(workdir)
  assert training.filmstrips(workdir).count("step ") == 2 * 2  # the caption is the alternative too
  assert "<svg" in training.curves(workdir, ["loss"])
  newer = max(workdir.glob("pictures/*/*.png"))
  shutil.copy(newer, newer.with_name("00000009.png"))
  assert training.state_of(workdir) != before
  assert "step 9" in training.filmstrips(workdir)


def test_what_is_no_picture_is_refused_by_its_name(tmp_path):
  (tmp_path / "x.png").write_text("no picture")
  with pytest.raises(InputError, match=r"holiday\.png is of no format"):
    opened({"path": str(tmp_path / "x.png"), "orig_name": "holiday.png"}, 32)


def test_latents_of_another_tokenizer_are_refused(studio, pipeline, monkeypatch):
  monkeypatch.setattr(
    content, "LatentStore", lambda path: type("Store", (), {"shape": (4, 4, 7)})()
  )
  with pytest.raises(InputError, match="have 7 channels, those of the model 48"):
    content.open_studio(studio.source, latents=str(pipeline / "latents"))


@pytest.mark.parametrize(
  ("host", "local"), [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)]
)
def test_who_can_open_the_page(host, local):
  assert content.is_local(host) == local


@pytest.fixture(scope="module")
def asked():
  """Hosts that this process looks up or connects to while the page is used."""
  found, connect, resolve = [], socket.socket.connect, socket.getaddrinfo

  def connecting(self, address):
    found.append(str(address[0] if isinstance(address, tuple) else "a local socket"))
    return connect(self, address)

  def resolving(host, *arguments, **options):
    found.append(str(host))
    return resolve(host, *arguments, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(socket.socket, "connect", connecting)
    patch.setattr(socket, "getaddrinfo", resolving)
    yield found


@pytest.fixture(scope="module")
def address(studio, asked):
  """Of the page, served by a thread."""
  with content.listen("127.0.0.1", 0) as listening:
    server = page.serve(studio, listening)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    host, port = listening.getsockname()
    yield f"http://{host}:{port}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
  """Chromium, which notes its requests and messages."""
  if not (BROWSER and DRIVER):
    pytest.skip("chromium and chromedriver are not installed (apt-get install chromium-driver)")
  webdriver = pytest.importorskip("selenium.webdriver")
  options = webdriver.ChromeOptions()
  options.binary_location = BROWSER
  for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
    options.add_argument(f"--{flag}")
  options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
  service = webdriver.ChromeService(DRIVER)
  browser = webdriver.Chrome(options=options, service=service)
  yield browser
  browser.quit()


@pytest.fixture
def at(browser, address):
  """Opens the page at a tab and with settings of the address; its console must stay clean."""

  def open_at(tab: str, **settings: object) -> Page:
    complaints()
    browser.get("about:blank")  # which breaks off what the page before was asking for
    browser.get_log("browser")
    query = "&".join(f"{name}={value}" for name, value in settings.items())
    browser.get(f"{address}?tab={tab.replace(' ', '%20')}&{query}")
    return Page(browser)

  def complaints() -> None:
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]

  yield open_at
  complaints()


class Page:
  """What a person does and sees."""

  def __init__(self, browser):
    self.browser = browser

  def wait(self, found, what: str):
    """The first result of `found()` that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      if result := found():
        return result
      time.sleep(0.05)
    pytest.fail(f"the page does not show {what}: {self.text()[-2000:]}")

  def text(self) -> str:
    return self.browser.execute_script("return document.body.innerText")

  def shows(self, text: str) -> None:
    self.wait(lambda: text in self.text(), text)

  def press(self, name: str) -> None:
    script = """return [...document.querySelectorAll("button")].find(
      (button) => button.innerText.trim() == arguments[0] && button.role != "tab"
        && button.offsetParent)"""
    button = self.wait(lambda: self.browser.execute_script(script, name), name)
    self.browser.execute_script("arguments[0].click()", button)

  def pictures(self, within: str) -> list[str]:
    """The addresses of the pictures in an element that can be seen."""
    script = """return [...document.querySelectorAll(arguments[0] + " img")]
      .filter((image) => image.offsetParent).map((image) => image.src)"""
    return self.browser.execute_script(script, within)

  def upload(self, path, place: int = 0) -> None:
    found = lambda: self.browser.find_elements("css selector", "input[type=file]")  # noqa: E731
    self.wait(lambda: len(found()) > place, "a place for a picture")
    found()[place].send_keys(str(path))

  def drawn(self) -> list[str]:
    """The pictures of Generate, once they are done."""
    self.shows("done")
    return self.pictures("#generated")


def test_a_seed_gives_its_pictures_and_the_link_has_all_settings(at, browser):
  first = at("Generate", seed=7, steps=4, guidance=2).drawn()
  assert len(first) == NUM
  other = at("Generate", seed=8, steps=4, guidance=2)
  assert other.drawn() != first
  other.press("Another seed")
  other.wait(lambda: "seed=8" not in browser.current_url, "another seed in the address")
  other.wait(lambda: "steps=4" in browser.current_url, "the steps in the address")
  assert at("Generate", seed=7, steps=4, guidance=2).drawn() == first


def test_a_picture_is_taken_apart(at, pictures, tmp_path):
  tab = at("Reconstruct")
  tab.upload(next(pictures.glob("*/*.png")))
  tab.shows("PSNR")
  assert len(tab.pictures(".tiles")) == 5
  (tmp_path / "letter.png").write_text("Dear Sir")
  wrong = at("Reconstruct")
  wrong.upload(tmp_path / "letter.png")
  wrong.shows("letter.png is of no format that can be read")


def test_there_is_a_way_between_seeds_and_between_pictures(at, pictures):
  tab = at("Between")
  tab.press("Draw the way")
  tab.shows("Save the animation")
  (of_seeds,) = tab.pictures(".way")
  tab.browser.execute_script(
    """[...document.querySelectorAll("[role=tab]")].find(
    (tab) => tab.innerText.trim() == "Two pictures").click()"""
  )
  first, second, *_ = sorted(pictures.glob("*/*.png"))
  tab.upload(first)
  tab.wait(lambda: len(tab.pictures("[data-testid=image]")) == 1, "the first picture")
  tab.upload(second, -1)
  tab.wait(lambda: tab.pictures(".way") != [of_seeds], "another way")


def test_a_place_of_the_map_is_decoded(at):
  tab = at("Latent space")
  tab.wait(lambda: tab.pictures("#map"), "the map")
  tab.browser.find_element("css selector", "#map img").click()
  tab.shows("This place")
  assert len(tab.pictures("#picked")) == 1 + space.NEAREST


def test_a_training_is_shown(at):
  tab = at("Training")
  tab.wait(lambda: tab.pictures(".film"), "the film")
  tab.wait(lambda: tab.browser.find_elements("css selector", ".charts svg"), "the curves")


def test_two_models_are_compared(at):
  tab = at("Compare")
  tab.press("Draw both")
  tab.shows("They differ by 0.0 of 255")
  assert len(tab.pictures("#compared")) == 2 * NUM


def test_a_tab_without_data_says_which_flag_gives_them():
  config = page.compose(content.open_studio("", num=NUM)).get_config_file()
  texts = [str(part["props"].get("value")) for part in config["components"]]
  for flag, count in (("--model=", 5), ("--latents=", 1), ("--workdir=", 1)):
    assert sum(flag in text for text in texts) == count


def test_no_request_left_the_machine(at, browser, asked):
  """The last test: of all before it."""
  at("Generate").drawn()
  hosts = set()
  for entry in browser.get_log("performance"):
    message = json.loads(entry["message"])["message"]
    if message["method"] == "Network.requestWillBeSent":
      address = urlsplit(message["params"]["request"]["url"])
      if address.scheme not in ("data", "blob", "chrome", "chrome-untrusted", "about"):
        hosts.add(address.hostname)
  assert hosts == {"127.0.0.1"}
  assert set(asked) <= {"127.0.0.1", "localhost", "a local socket"}
