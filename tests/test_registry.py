"""The registry: what it finds, what it refuses, and that a damaged package elsewhere never stops it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeforge import __version__, registry
from saeforge.errors import PluginError
from saeforge.registry import FORMATS, VARIANTS, PluginGroup, PluginRecord

ROOT = Path(__file__).parents[1]
GROUP = "test.plugins"
BASE = '''
from abc import ABC, abstractmethod

class Base(ABC):
    """The contract."""

    def __init__(self, d_in: int, *, k: int = 3) -> None:
        self.d_in = d_in

    @abstractmethod
    def step(self) -> int: ...

class Plain(Base):
    """The built-in plugin."""

    def step(self) -> int:
        return 1
'''
GOOD = '''
from plug_base import Base

class Good(Base):
    """A third-party plugin."""

    def step(self) -> int:
        return 2
'''


class Site:
    """A folder on sys.path, to be filled with modules and with the metadata of installed distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def module(self, name: str, source: str) -> None:
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source))

    def distribution(
        self, name: str, entries: str, *, version: str = "1.0", requires: str = "", info: str = ""
    ) -> Path:
        """Metadata of one distribution; `entries` are the lines under the group, or a whole file if they have a ["""
        info = info or f"{name.replace('-', '_')}-{version}.dist-info"
        path = self.folder / info
        path.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}\n"
        (path / ("PKG-INFO" if info.endswith("egg-info") else "METADATA")).write_text(metadata)
        (path / "entry_points.txt").write_text(entries if "[" in entries else f"[{GROUP}]\n{entries}\n")
        return path


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.delenv("SAEFORGE_PLUGINS", raising=False)
    site = Site(tmp_path / "first")
    site.module("plug_base", BASE)
    monkeypatch.syspath_prepend(str(site.folder))
    yield site
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def group(site: Site) -> PluginGroup:
    return PluginGroup(GROUP, base="plug_base:Base", builtins={"plain": "plug_base:Plain"})


def record(group: PluginGroup, name: str) -> PluginRecord:
    (found,) = [r for r in group.records() if r.name == name]
    return found


# ---- finding and loading


def test_a_plugin_is_listed_without_being_imported_and_imported_when_asked_for(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good", version="0.3")
    assert record(group, "good") == PluginRecord("good", "plug_good", "Good", "plug-good", "0.3")
    assert group.class_path("good") == "plug_good.Good"
    assert group.names() == ["good", "plain"]
    assert "plug_good" not in sys.modules
    assert "plug_base" not in sys.modules

    cls = group.load("good")
    assert cls is sys.modules["plug_good"].Good
    assert group.load("good") is cls
    assert record(group, "good").status == "ok"
    assert record(group, "plain").status == "unloaded"


def test_a_plugin_is_checked_once(site: Site, group: PluginGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    group.load("plain")

    def refuse(candidate: object, base: type) -> list[str]:
        return ["checked again"]

    monkeypatch.setattr(registry, "contract_faults", refuse)
    group.load("plain")
    group.refresh()
    with pytest.raises(PluginError, match="checked again"):
        group.load("plain")


def test_a_full_class_path_loads_without_any_entry_point(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    assert group.load("plug_good.Good").__name__ == "Good"
    assert group.class_path("plug_good.Good") == "plug_good.Good"


def test_builtins_work_in_a_source_tree_without_metadata(group: PluginGroup) -> None:
    assert group.load("plain").__name__ == "Plain"
    assert (record(group, "plain").distribution, record(group, "plain").version) == ("saeforge", __version__)


def test_old_metadata_of_saeforge_itself_does_not_contest_the_builtins(site: Site, group: PluginGroup) -> None:
    site.distribution("saeforge", "plain = plug_base:Plain\ngone = plug_base:Gone", version="0.0.1")
    assert group.names() == ["plain"]
    assert record(group, "plain").version == __version__


def test_refresh_sees_a_package_installed_since(site: Site, group: PluginGroup) -> None:
    assert group.names() == ["plain"]
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good")
    assert group.names() == ["plain"]
    group.refresh()
    assert group.names() == ["good", "plain"]


def test_name_of_gives_name_distribution_and_version_for_provenance(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good", version="0.3")
    found = group.name_of(group.load("good"))
    assert (found.name, found.distribution, found.version) == ("good", "plug-good", "0.3")


def test_name_of_a_class_that_no_plugin_names_is_its_class_path(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    found = group.name_of(group.load("plug_good.Good"))
    assert (found.name, found.distribution, found.version) == ("plug_good.Good", "", "")
    owned = group.name_of(pytest.MonkeyPatch)
    assert owned.distribution == "pytest"
    assert owned.version == importlib.metadata.version("pytest")


# ---- traps of the entrypoints package


def test_a_malformed_file_of_another_package_hides_no_plugin_and_is_named(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good")
    site.distribution("foreign", "[console_scripts]\nrun = a:b\nrun = c:d\n")
    assert record(group, "good").distribution == "plug-good"
    (warning,) = group.warnings()
    assert "DuplicateOptionError" in warning
    assert "foreign-1.0.dist-info" in warning
    assert "\n" not in warning


def test_a_file_that_is_no_text_hides_no_plugin_and_is_named(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-good", "good = plug_good:Good")
    (site.distribution("foreign", "") / "entry_points.txt").write_bytes(b"\xff\xfe[a]\n")
    assert "good" in group.names()
    assert any("foreign-1.0.dist-info" in warning for warning in group.warnings())


def test_name_and_version_of_an_egg_info_with_a_dash_are_the_true_ones(site: Site, group: PluginGroup) -> None:
    site.distribution("my-plug", "one = plug_one:One", version="2.5", info="my-plug.egg-info")
    assert (record(group, "one").distribution, record(group, "one").version) == ("my-plug", "2.5")


def test_an_egg_info_hides_no_other_with_the_same_first_word(site: Site, group: PluginGroup) -> None:
    # Folders are read in no particular order: with eight others, ours is hardly ever the first.
    for number in range(8):
        site.distribution(f"my-{number}", "[console_scripts]\nrun = a:b\n", info=f"my-{number}.egg-info")
    site.distribution("my-plug", "one = plug_one:One", info="my-plug.egg-info")
    site.distribution("my-other", "two = plug_two:Two", info="my-other.egg-info")
    assert group.names() == ["one", "plain", "two"]


def test_a_dist_info_keeps_the_dash_that_its_folder_lost(site: Site, group: PluginGroup) -> None:
    site.distribution("ed-plug", "ed = plug_ed:Ed", info="ed_plug-1.0.dist-info")
    assert record(group, "ed").distribution == "ed-plug"


@pytest.mark.parametrize("value", ["not a target!", "plug_good", "a:b:c"])
def test_an_unparsable_value_is_a_broken_record(site: Site, group: PluginGroup, value: str) -> None:
    site.distribution("plug-bad", f"bad = {value}\ngood = plug_good:Good")
    assert record(group, "bad").status == "broken"
    assert value in record(group, "bad").error
    assert "bad" not in group.names()
    with pytest.raises(PluginError, match=r"plug-bad 1\.0 is not of the form 'module:Class'"):
        group.load("bad")
    assert record(group, "good").status == "unloaded"


def test_a_name_that_could_be_a_class_path_is_a_broken_record(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-bad", "my.name = plug_good:Good")
    assert record(group, "my.name").status == "broken"


def test_metadata_without_a_name_is_reported_and_not_guessed(site: Site, group: PluginGroup) -> None:
    (site.distribution("plug-good", "good = plug_good:Good") / "METADATA").unlink()
    assert group.names() == ["plain"]
    assert any("good = plug_good:Good" in warning for warning in group.warnings())


def test_of_one_distribution_at_two_places_the_first_on_the_path_counts(
    site: Site, group: PluginGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = Site(tmp_path / "later")
    later.distribution("Plug_Good", "good = plug_old:Good\nextra = plug_old:Extra", version="0.1")
    site.distribution("plug-good", "good = plug_good:Good", version="0.3")
    monkeypatch.setattr(sys, "path", [*sys.path, str(later.folder), str(site.folder)])
    assert (record(group, "good").module, record(group, "good").version) == ("plug_good", "0.3")
    assert group.names() == ["good", "plain"]


# ---- clashes


def test_two_distributions_with_one_name_are_an_error_that_names_both_and_the_ways_out(
    site: Site, group: PluginGroup
) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-one", "good = plug_good:Good", version="0.1")
    site.distribution("plug-two", "good = plug_other:Other", version="0.2")
    assert [(r.distribution, r.status) for r in group.records() if r.name == "good"] == [
        ("plug-one", "clash"),
        ("plug-two", "clash"),
    ]
    assert group.names() == ["plain"]
    with pytest.raises(PluginError) as caught:
        group.load("good")
    for part in (
        "plug-one 0.1 (plug_good:Good)",
        "plug-two 0.2 (plug_other:Other)",
        "full class path (plug_good.Good or plug_other.Other)",
        "uninstall one",
    ):
        assert part in str(caught.value)
    with pytest.raises(PluginError, match="plug-one"):
        group.class_path("good")
    assert group.load("plug_good.Good").__name__ == "Good"


def test_a_plugin_cannot_take_the_name_of_a_builtin(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-good", "plain = plug_good:Good")
    with pytest.raises(PluginError, match=r"saeforge .*\(plug_base:Plain\) and plug-good 1\.0 \(plug_good:Good\)"):
        group.load("plain")


def test_a_clash_leaves_other_names_alone(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-one", "good = plug_good:Good")
    site.distribution("plug-two", "good = plug_good:Good")
    assert group.load("plain").__name__ == "Plain"


# ---- broken plugins

ABSTRACT = "from plug_base import Base\nclass Bad(Base):\n    'Forgot step.'\n"
UNTYPED = GOOD + "\nclass Bad(Good):\n    'Doc.'\n    def __init__(self, d_in: int, k) -> None: ...\n"
VARIADIC = GOOD + "\nclass Bad(Good):\n    'Doc.'\n    def __init__(self, *args: int, **kwargs: int) -> None: ...\n"
UNDOCUMENTED = GOOD + "\nclass Bad(Good):\n    pass\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'plug_bad'"),
        ("", "AttributeError: module 'plug_bad' has no attribute 'Bad'"),
        ("import does_not_exist_anywhere", "No module named 'does_not_exist_anywhere'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("Bad = 3", "expected a class, got int"),
        ("class Bad:\n    'Doc.'", "expected a subclass of plug_base.Base"),
        (ABSTRACT, "it is abstract: implement step"),
        (UNTYPED, "__init__ argument 'k' has no type annotation"),
        (VARIADIC, "__init__ takes *args: name every argument; __init__ takes **kwargs: name every argument"),
        (UNDOCUMENTED, "it has no docstring"),
    ],
)
def test_a_broken_plugin_says_why_and_whose_it_is_and_stops_nothing_else(
    site: Site, group: PluginGroup, source: str | None, reason: str
) -> None:
    if source is not None:
        site.module("plug_bad", source)
    site.distribution("plug-bad", "bad = plug_bad:Bad", version="0.7")
    assert record(group, "bad").status == "unloaded"
    with pytest.raises(PluginError) as caught:
        group.load("bad")
    message = str(caught.value)
    assert reason in message
    assert "plug-bad 0.7 (plug_bad:Bad)" in message
    assert "\n" not in message
    assert (record(group, "bad").status, record(group, "bad").error) == ("broken", message)
    assert group.load("plain").__name__ == "Plain"


def test_the_original_error_of_a_broken_plugin_is_chained(site: Site, group: PluginGroup) -> None:
    site.module("plug_bad", "1 / 0")
    site.distribution("plug-bad", "bad = plug_bad:Bad")
    with pytest.raises(PluginError) as caught:
        group.load("bad")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_mended_plugin_is_no_longer_broken(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-good", "good = plug_good:Good")
    with pytest.raises(PluginError):
        group.load("good")
    site.module("plug_good", GOOD)
    importlib.invalidate_caches()
    group.load("good")
    assert (record(group, "good").status, record(group, "good").error) == ("ok", "")


# ---- versions


@pytest.mark.parametrize(
    ("requires", "misfit"),
    [
        ("saeforge<0.0.1", f"made for saeforge<0.0.1, this is {__version__}"),
        ("saeforge (>=99)", f"made for saeforge>=99, this is {__version__}"),
        ("saeforge>=0.0.1", ""),
        ("saeforge", ""),
        ("saeforge-extras>=99", ""),
        ("saeforge>=99; python_version < '3'", ""),
        ("saeforge>=99; extra == 'all'", ""),
        ("saeforge>>1", "its requirement 'saeforge>>1' cannot be read"),
    ],
)
def test_a_plugin_made_for_another_saeforge_is_reported(
    site: Site, group: PluginGroup, requires: str, misfit: str
) -> None:
    site.distribution("plug-good", "good = plug_good:Good", requires=f"Requires-Dist: {requires}\n")
    found = record(group, "good")
    assert found.status == ("incompatible" if misfit else "unloaded")
    assert found.error.startswith(misfit)
    assert bool(found.error) == bool(misfit)


def test_an_incompatible_plugin_loads_with_a_warning(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good", requires="Requires-Dist: saeforge>=99\n")
    with pytest.warns(UserWarning, match=r"plug-good 1\.0 .*: made for saeforge>=99"):
        group.load("good")
    assert record(group, "good").status == "incompatible"


def test_an_incompatible_plugin_that_fails_says_so_in_its_error(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-bad", "bad = plug_bad:Bad", requires="Requires-Dist: saeforge>=99\n")
    with pytest.raises(PluginError, match=r"No module named 'plug_bad' \(made for saeforge>=99"):
        group.load("bad")


# ---- names and the environment


def test_a_typo_gets_a_suggestion_and_the_list(site: Site, group: PluginGroup) -> None:
    site.distribution("plug-good", "good = plug_good:Good")
    with pytest.raises(PluginError, match="unknown plugin 'Goood'; available: good, plain; did you mean 'good'"):
        group.load("Goood")


def test_the_environment_allows_named_plugins_only(
    site: Site, group: PluginGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.distribution("plug-good", "good = plug_good:Good\nother = plug_good:Other\nthird = plug_good:Third")
    monkeypatch.setenv("SAEFORGE_PLUGINS", "good, third")
    assert group.names() == ["good", "plain", "third"]
    with pytest.raises(PluginError, match="it is installed, but SAEFORGE_PLUGINS='good, third' hides it"):
        group.load("other")


def test_the_environment_can_turn_plugins_off_even_loaded_ones(
    site: Site, group: PluginGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good\nplain = plug_good:Good")
    group.load("good")
    monkeypatch.setenv("SAEFORGE_PLUGINS", "off")
    assert group.names() == ["plain"]
    assert group.load("plain").__module__ == "plug_base"
    with pytest.raises(PluginError, match="unknown plugin 'good'"):
        group.load("good")


# ---- registration in this process


def test_a_registered_class_has_its_name_for_the_block_only(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    good = group.load("plug_good.Good")
    with group.register("mine", good):
        assert group.load("mine") is good
        assert group.class_path("mine") == "plug_good.Good"
        assert group.name_of(good).name == "mine"
    assert group.names() == ["plain"]
    with pytest.raises(PluginError, match="unknown plugin 'mine'"):
        group.load("mine")


def test_a_registered_class_stays_without_a_block_and_may_be_registered_again(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    good = group.load("plug_good.Good")
    group.register("mine", good)
    group.register("mine", good)
    assert group.load("mine") is good


def test_a_name_given_back_can_name_another_class(site: Site, group: PluginGroup) -> None:
    site.module("plug_good", GOOD)
    good, plain = group.load("plug_good.Good"), group.load("plain")
    for cls in (good, plain):
        with group.register("mine", cls):
            assert group.load("mine") is cls


@pytest.mark.parametrize(("name", "holder"), [("plain", r"saeforge \S+ \(plug_base:Plain"), ("good", "plug-good 1.0")])
def test_registration_follows_the_rule_of_clashes(site: Site, group: PluginGroup, name: str, holder: str) -> None:
    site.module("plug_good", GOOD)
    site.distribution("plug-good", "good = plug_good:Good")
    with pytest.raises(PluginError, match=holder):
        group.register(name, group.load("plug_good.Good"))


def test_registration_checks_the_contract_and_the_name(site: Site, group: PluginGroup) -> None:
    with pytest.raises(PluginError, match=r"expected a subclass of plug_base\.Base"):
        group.register("mine", int)
    with pytest.raises(PluginError, match=r"name 'my\.name' is not usable"):
        group.register("my.name", group.load("plain"))


# ---- the variants of saeforge


@pytest.mark.parametrize("group", [VARIANTS, FORMATS], ids=lambda group: group.group)
def test_the_static_table_is_the_one_in_pyproject(group: PluginGroup) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"][group.group]
    own = {r.name: f"{r.module}:{r.object}" for r in group.records() if r.distribution == "saeforge"}
    assert own == declared


@pytest.mark.parametrize("group", [VARIANTS, FORMATS], ids=lambda group: group.group)
def test_every_builtin_plugin_loads_and_keeps_the_contract(group: PluginGroup) -> None:
    own = [r for r in group.records() if r.distribution == "saeforge"]
    assert {group.name_of(group.load(r.name)).name for r in own} == {r.name for r in own}


def test_importing_the_registry_imports_no_torch() -> None:
    code = "import sys, saeforge.registry as r; r.VARIANTS.records(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
