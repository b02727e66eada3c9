"""Registering the plugin: what changes on disk, what a fresh interpreter finds afterwards, and what is refused.

MindIE is a stand-in with the signatures of the real one. ATB_LLM_HOME names a real atb_llm, which is tested as well.
"""

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from atb_pllava.__main__ import main
from atb_pllava.doctor.required_packages import PLUGIN_REQUIRED, REQUIRED
from atb_pllava.errors import ConfigError
from atb_pllava.loader.checkpoint_config import config_from_json
from atb_pllava.mindie import install as installation
from atb_pllava.mindie.contract import CONTRACT, RUNNER_CONTRACT, check_contract
from atb_pllava.mindie.host_files import host_config
from atb_pllava.mindie.launch import runner_command
from atb_pllava.mindie.locate import find_atb_llm, find_examples
from tests.host_sources import HOST, RUNNER_SOURCES, write_host
from tests.support import ROOT, raw_config, run_main, write_checkpoint

REAL = os.environ.get("ATB_LLM_HOME")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A stand-in of atb_llm in a directory of its own."""
    return write_host(tmp_path / "host")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages directory of which a fresh interpreter reads the .pth files."""
    directory = tmp_path / "site"
    directory.mkdir()
    return directory


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a plugin that only says it was loaded, in the place of atb_pllava."""
    root = tmp_path / "it's a clone" / "atb_pllava"
    plugin = root / "mindie" / "plugin" / "pllava"
    plugin.mkdir(parents=True)
    (root / "__init__.py").write_text("")
    shutil.copy(Path(installation.__file__).with_name("hook.py"), root / "mindie" / "hook.py")
    (plugin / "__init__.py").write_text("")
    (plugin / "router_pllava.py").write_text(HOST["models/llava/router_llava.py"].replace("Llava", "Pllava"))
    monkeypatch.setattr(installation, "PACKAGE", root)
    monkeypatch.setattr(installation, "PLUGIN", plugin)
    return root


def weights(directory: Path, model_type: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return directory


def mindie(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return run_main(capsys, main, "mindie", *arguments)


def tree(*roots: Path) -> dict[str, object]:
    """Every name below the directories with what it is: a link's target, a file's bytes."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for root in roots
        for path in sorted(root.rglob("*"))
        if "__pycache__" not in path.parts
    }


def python(site: Path, host: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that treats `site` as a site directory and has the host on its path."""
    startup = f"import site; site.addsitedir({str(site)!r}); import sys; sys.path.append({str(host.parent)!r})\n"
    return subprocess.run([sys.executable, "-I", "-c", startup + code], capture_output=True, text=True, timeout=60)


ASK = (
    "from atb_llm.models import get_model; r = get_model({path!r}, True, revision='x'); print(type(r).__name__, r.args)"
)


@pytest.mark.parametrize("way", installation.WAYS)
def test_a_fresh_interpreter_finds_the_plugin_until_it_is_taken_out(capsys, host, site, package, way, tmp_path) -> None:
    options = ("--atb_llm", host, "--site", site)
    before = tree(host, site)
    status, out, _ = mindie(capsys, "install", *options, f"--{way}")
    assert status == 0 and len(out.splitlines()) == 1 and str(site if way == "hook" else host) in out
    installed = tree(host, site)
    assert installed != before
    assert mindie(capsys, "install", *options, f"--{way}") == (0, "nothing to change, the plugin is registered\n", "")
    assert tree(host, site) == installed
    assert mindie(capsys, "status", *options)[0] == 0
    pllava = weights(tmp_path / "w", "PLLaVA")
    llava = weights(tmp_path / "v", "llava")
    done = python(site, host, ASK.format(path=str(pllava)))
    assert done.stdout == f"PllavaRouter {(str(pllava), True, 'x')}\n" and done.stderr == ""
    done = python(site, host, ASK.format(path=str(llava)))
    assert done.stdout == f"LlavaRouter {(str(llava), True, 'x')}\n"
    done = python(site, host, ASK.format(path=str(weights(tmp_path / "o", "other"))))
    assert "NotImplementedError: unsupported model type: other" in done.stderr
    status, out, _ = mindie(capsys, "uninstall", *options)
    assert status == 0 and out.startswith(f"removed {way} ") and tree(host, site) == before
    assert mindie(capsys, "uninstall", *options)[1] == "nothing to change, no plugin is registered\n"
    assert "unsupported model type: pllava" in python(site, host, ASK.format(path=str(pllava))).stderr


def test_the_last_way_asked_for_is_the_only_one(capsys, host, site, package) -> None:
    options = ("--atb_llm", host, "--site", site)
    states = []
    for way in ("link", "copy", "hook", "link"):
        assert mindie(capsys, "install", *options, f"--{way}")[0] == 0
        states.append([r.way for r in installation.find_registrations(host, [site])])
    assert states == [["link"], ["copy"], ["hook"], ["link"]]
    assert not [name for name in os.listdir(host / "models") if name.startswith("_pllava")]


def test_hooks_in_other_site_directories_are_found(capsys, host, site, package, tmp_path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    installation.install(host, "hook", [old])
    assert installation.install(host, "hook", [site, old]) == []  # one hook is enough, wherever it is
    changes = installation.install(host, "link", [site, old])
    assert changes[0] == f"removed hook {old / installation.PTH}" and changes[1].startswith("linked ")
    assert not list(site.iterdir()) and not list(old.iterdir())


def test_a_copy_that_fails_leaves_what_was_there(host, site, package, monkeypatch) -> None:
    installation.install(host, "link", [site])
    before = tree(host, site)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installation.shutil, "copytree", full)
    with pytest.raises(OSError, match="No space"):
        installation.install(host, "copy", [site])
    assert tree(host, site) == before


def test_a_copy_needs_nothing_of_the_original(capsys, host, site, package, tmp_path) -> None:
    (package / "engine.py").write_text("ANSWER = 42\n")
    mindie(capsys, "install", "--atb_llm", host, "--site", site, "--copy")
    (package / "engine.py").write_text("ANSWER = 43\n")
    status, out, _ = mindie(capsys, "status", "--atb_llm", host, "--site", site)
    assert status == 1 and "1 files differ from this version" in out
    assert mindie(capsys, "install", "--atb_llm", host, "--site", site, "--copy")[0] == 0
    shutil.rmtree(package.parent)
    copied = host / "models" / "pllava" / installation.VENDORED / "atb_pllava" / "engine.py"
    assert copied.read_text() == "ANSWER = 43\n"
    assert stat.S_IMODE((host / "models" / "pllava").stat().st_mode) == 0o755
    done = python(site, host, ASK.format(path=str(weights(tmp_path / "w", "pllava"))))
    assert done.stdout.startswith("PllavaRouter"), done.stderr


@pytest.mark.parametrize("foreign", ["folder", "link", "file"])
@pytest.mark.parametrize("way", installation.WAYS)
def test_what_is_not_ours_is_never_touched(capsys, host, site, package, foreign, way, tmp_path) -> None:
    place = host / "models" / "pllava"
    if foreign == "folder":
        place.mkdir()
        (place / "router_pllava.py").write_text("theirs")
    elif foreign == "link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_text("theirs")
    before = tree(host, site)
    status, _, err = mindie(capsys, "install", "--atb_llm", host, "--site", site, f"--{way}")
    assert status == 2 and "is not of atb_pllava" in err and tree(host, site) == before
    mindie(capsys, "uninstall", "--atb_llm", host, "--site", site)
    assert tree(host, site) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("models/__init__.py", "is_flash_causal_lm: bool = True", "role, is_flash_causal_lm: bool = True", "get_model"),
        ("models/__init__.py", "def safe_get_config_dict", "def read_config", "safe_get_config_dict is not there"),
        ("models/__init__.py", "os.path.abspath(__file__)", "os.environ['MODELS']", "does not use __file__"),
        ("models/base/router.py", "    revision: str = None\n", "", "BaseRouter takes"),
        ("models/base/router.py", "def get_config(self)", "def load(self)", "BaseRouter.get_config is not there"),
        ("models/base/router.py", "inputs, **kwargs", "inputs", "takes no **kwargs"),
        ("models/base/flash_causal_lm.py", "=None, reset=False", ", reset", "requires reset"),
        ("models/base/flash_causal_lm.py", "slots, input_lengths", "input_lengths, slots", "forward takes"),
        ("models/llama/flash_causal_llama.py", "skip_word_embedding", "skip_embedding", "skip_word_embedding"),
        ("utils/shm_utils.py", "(file_path)", "(owner, file_path)", "release_shared_memory takes (owner, file_path)"),
        ("utils/weights.py", "class Weights:", "class Weights", "cannot be read"),
    ],
)
def test_a_host_with_another_contract_is_refused(capsys, host, site, package, file, old, new, message) -> None:
    text = (host / file).read_text()
    assert old in text
    (host / file).write_text(text.replace(old, new))
    before = tree(host, site)
    for way in installation.WAYS:
        status, _, err = mindie(capsys, "install", "--atb_llm", host, "--site", site, f"--{way}")
        assert status == 2 and message in err and "nothing was changed" in err and tree(host, site) == before
    assert mindie(capsys, "status", "--atb_llm", host, "--site", site)[0] == 1


def test_all_that_the_plugin_imports_is_in_the_contract() -> None:
    for file in installation.PLUGIN.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("atb_llm.") and ".pllava." not in module:
                lines = CONTRACT[module.removeprefix("atb_llm.").replace(".", "/") + ".py"]
                assert all(any(alias.name in line for line in lines) for alias in node.names), f"{file.name}: {module}"


def test_more_optional_parameters_are_fine(host) -> None:
    file = host / "models" / "__init__.py"
    file.write_text(file.read_text().replace('sub_model_path=""', 'sub_model_path="", *, new=1'))
    assert check_contract(host, CONTRACT) == []
    (host / "utils" / "weights.py").unlink()
    (problem,) = check_contract(host, CONTRACT)
    assert problem.endswith("weights.py: does not exist")


def test_the_hook_is_silent_and_lazy_in_other_programs(capsys, host, site, package) -> None:
    mindie(capsys, "install", "--atb_llm", host, "--site", site, "--hook")
    (line,) = (site / installation.PTH).read_text().splitlines()
    assert line.startswith("import sys; exec(")
    seen = "import sys, json, decimal; print(sorted(m for m in sys.modules if 'pllava' in m), len(sys.meta_path))"
    plain = subprocess.run([sys.executable, "-I", "-c", seen], capture_output=True, text=True, timeout=60)
    done = python(site, host, seen)
    assert done.stderr == "" and done.stdout == plain.stdout.replace(plain.stdout[-2], str(int(plain.stdout[-2]) + 1))


def test_the_hook_tells_published_weights_from_llava(capsys, host, site, package, tmp_path) -> None:
    mindie(capsys, "install", "--atb_llm", host, "--site", site, "--hook")
    published = weights(tmp_path / "p", "llava")
    (published / "config.json").write_text('{"model_type": "llava", "pooling_shape": [16, 12, 12]}')
    done = python(site, host, ASK.format(path=str(published)))
    assert f"convert_quant_weights.sh -src {published} " in done.stderr and "-type pllava_merged" in done.stderr


def test_a_broken_hook_stops_no_program(capsys, host, site, package, tmp_path) -> None:
    mindie(capsys, "install", "--atb_llm", host, "--site", site, "--hook")
    llava = ASK.format(path=str(weights(tmp_path / "v", "llava")))
    (package / "mindie" / "hook.py").write_text("this is no Python")
    done = python(site, host, llava)
    assert done.stdout.startswith("LlavaRouter") and done.returncode == 0
    assert done.stderr.count("atb_pllava: the import hook failed") == 1
    shutil.rmtree(package.parent)
    done = python(site, host, llava)
    assert done.stdout.startswith("LlavaRouter") and "the import hook failed" in done.stderr
    assert python(site, host, "print('fine')").stderr == ""
    status, out, _ = mindie(capsys, "status", "--atb_llm", host, "--site", site)
    assert status == 1 and "the plugin it points to is gone" in out
    assert mindie(capsys, "uninstall", "--atb_llm", host, "--site", site)[0] == 0
    assert not list(site.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_write_permission_the_hook_is_the_default(capsys, host, site, package) -> None:
    (host / "models").chmod(0o555)
    try:
        default = mindie(capsys, "install", "--atb_llm", host, "--site", site)
        link = mindie(capsys, "install", "--atb_llm", host, "--site", site, "--link")
    finally:
        (host / "models").chmod(0o755)
    assert default[0] == 0 and "import hook" in default[1]
    assert link[0] == 2 and "cannot be written" in link[2] and "--hook" in link[2]


def test_atb_llm_is_found_without_importing_it(host, tmp_path) -> None:
    (host / "__init__.py").write_text("raise RuntimeError('imported')")
    assert find_atb_llm(str(host), None) == host == find_atb_llm(str(host.parent), None)
    assert find_atb_llm(None, str(host.parent), []) == host
    assert find_atb_llm(None, "/nowhere", [str(tmp_path), str(host.parent)]) == host
    assert find_atb_llm(None, None, [str(tmp_path)]) is None


def test_the_commands_need_no_package_that_the_plugin_does_not(host, site, tmp_path) -> None:
    """In MindIE's image only the packages of PLUGIN_REQUIRED have to be added."""
    absent = sorted(set(REQUIRED) - set(PLUGIN_REQUIRED))
    raw = raw_config()
    model = write_checkpoint(tmp_path / "m", raw)
    config = host_config({**raw, "torch_dtype": "float16"}, {}, config_from_json(raw), quantised=False)
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    places = ["--atb_llm", str(host), "--site", str(site)]
    for words in (
        ["install", *places],
        ["status", *places, "--model_path", str(model)],
        ["config", "--model_path", str(model), "--card_memory", "64"],
        ["uninstall", *places],
    ):
        code = f"import sys; sys.modules.update(dict.fromkeys({absent})); sys.argv[1:] = ['mindie', *{words}]\n"
        code += "from atb_pllava.__main__ import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["install"], "no atb_llm found"),
        (["install", "--atb_llm", "/nowhere"], "'/nowhere' is no atb_llm"),
        (["uninstall", "--site", "/nowhere"], "'/nowhere' is no directory"),
    ],
)
def test_bad_input_is_one_message(capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.delenv("ATB_SPEED_HOME_PATH", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not os.path.isdir(os.path.join(p, "atb_llm"))])
    status, out, err = mindie(capsys, *arguments)
    assert status == 2 and message in err and out == ""


def test_status_says_what_is_missing(capsys, host, site, package, monkeypatch) -> None:
    status, out, _ = mindie(capsys, "status", "--atb_llm", host, "--site", site)
    assert status == 1 and "not registered: python -m atb_pllava mindie install" in out
    mindie(capsys, "install", "--atb_llm", host, "--site", site)
    tiny = ROOT / "examples" / "tiny_pllava"
    status, out, _ = mindie(capsys, "status", "--atb_llm", host, "--site", site, "--model_path", tiny)
    assert status == 1 and "convert_quant_weights.sh -src" in out and "pllava_merged" in out


@pytest.mark.skipif(REAL is None, reason="ATB_LLM_HOME names no real atb_llm")
def test_the_real_host_keeps_the_contract(tmp_path, capsys, site, package) -> None:
    home = find_atb_llm(REAL, None)
    assert home is not None and check_contract(home, CONTRACT) == []
    examples = find_examples(home)
    assert examples is not None and check_contract(examples, RUNNER_CONTRACT) == []
    copy = Path(shutil.copytree(home, tmp_path / "atb_llm", ignore=shutil.ignore_patterns("__pycache__")))
    before = tree(copy, site)
    for way in installation.WAYS:
        assert mindie(capsys, "install", "--atb_llm", copy, "--site", site, f"--{way}")[0] == 0
        assert mindie(capsys, "status", "--atb_llm", copy, "--site", site)[0] == 0
    mindie(capsys, "uninstall", "--atb_llm", copy, "--site", site)
    assert tree(copy, site) == before


def test_the_command_that_starts_mindies_runner(host, tmp_path, monkeypatch) -> None:
    for name, text in RUNNER_SOURCES.items():
        file = host.parent / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    work = tmp_path / "work"
    work.mkdir(mode=0o755)
    monkeypatch.chdir(work)
    options = {"mode": "run", "model_path": str(work), "prompt": ['what "is" it?']}
    given = {"PYTHONPATH": "/given", "TASK_QUEUE_ENABLE": "2", "ASCEND_RT_VISIBLE_DEVICES": "5,3"}
    command, variables = runner_command(host, options, 1, given)
    assert command[0] == sys.executable and command[1].endswith("atb_pllava/mindie/runner.py")
    assert json.loads(command[-1]) == options
    assert variables["TASK_QUEUE_ENABLE"] == "2" and variables["ASCEND_RT_VISIBLE_DEVICES"] == "5,3"
    assert variables["ATB_LLM_BENCHMARK_ENABLE"] == "1"
    assert variables["ATB_LLM_BENCHMARK_FILEPATH"] == str(work / "benchmark.csv")
    assert variables["PYTHONPATH"].split(":") == ["/given", str(host.parent), str(ROOT)]
    monkeypatch.setattr("atb_pllava.mindie.launch.site_directories", lambda: [ROOT])
    _, installed = runner_command(host, options, 1, given)
    assert installed["PYTHONPATH"].split(":") == ["/given", str(host.parent)]  # site-packages are on every sys.path
    command, _ = runner_command(host, options, 2, {**given, "MASTER_PORT": "20031"})
    assert command[1:3] == ["-m", "torch.distributed.run"] and command[command.index("--nproc_per_node") + 1] == "2"
    assert command[command.index("--master_port") + 1] == "20031"
    ports = {runner_command(host, options, 2, given)[0][8] for _ in range(3)}
    assert all(1024 <= int(port) < 65536 for port in ports)
    work.chmod(0o777)
    with pytest.raises(ConfigError, match="mode 777, which MindIE refuses: chmod 775"):
        runner_command(host, options, 1, given)
    runner_command(host, options, 1, {**given, "MINDIE_CHECK_INPUTFILES_PERMISSION": "0"})
    (host.parent / "examples" / "server" / "generate.py").write_text("def generate_req(): ...")
    with pytest.raises(ConfigError, match="generate_req takes"):
        runner_command(host, options, 1, given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--media", "m"], "not registered with MindIE"),
        (["precision", "--media", "m", "--prompt", "a", "--prompt", "b"], "give one question"),
        (["performance", "--media", "m", "--batch_sizes", "2", "0"], "--batch_sizes has 0"),
        (["run", "--media", "m", "--max_batch_size", "0"], "--max_batch_size is 0"),
        (["run", "--media", "m", "--num_frames", "0"], "num_frames is 0"),
        (["performance", "--media", "m", "--csv", "/nowhere/t.csv"], "--csv '/nowhere/t.csv' cannot be"),
    ],
)
def test_runs_that_cannot_work_are_refused_before_they_start(
    capsys, host, site, package, tmp_path, arguments, message
) -> None:
    places = ("--atb_llm", host, "--site", site)
    if "registered" not in message:
        mindie(capsys, "install", *places)
    raw = raw_config()
    model = weights(tmp_path / "w", "pllava")
    config = host_config({**raw, "torch_dtype": "float16"}, {}, config_from_json(raw), quantised=False)
    (model / "config.json").write_text(json.dumps({**config, "torch_dtype": "float16"}))
    status, _, err = mindie(capsys, *arguments, "--model_path", model, *places)
    assert status == 2 and message in err
