"""What can be said about lower tiers, and what is answered to what cannot be had."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tierkv.engine.tiers as tiers
from tierkv.cache.layout import KVLayout
from tierkv.cache.pools import GpuPool
from tierkv.cli import serve
from tierkv.cli.main import main
from tierkv.config import EngineConfig
from tierkv.engine.core import LowerTierSetup
from tierkv.engine.cost import MeasuredCost
from tierkv.engine.tiers import TierRequest, default_path, open_tiers, parse_offload
from tierkv.errors import ConfigError
from tierkv.storage.io import IoEngine
from tierkv.storage.lock import holder
from tierkv.types import TierName

CPU, NVME = TierName.CPU, TierName.NVME


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu", {CPU: TierRequest()}),
        ("nvme,cpu", {CPU: TierRequest(), NVME: TierRequest()}),
        (" cpu = 2GiB , nvme ", {CPU: TierRequest(2 << 30), NVME: TierRequest()}),
        (
            "cpu=16GiB,nvme=200GiB:/path=x:y",
            {CPU: TierRequest(16 << 30), NVME: TierRequest(200 << 30, Path("/path=x:y"))},
        ),
        ("nvme=:/path", {NVME: TierRequest(None, Path("/path"))}),
        ("auto", {CPU: TierRequest(), NVME: TierRequest()}),
        (None, {}),
    ],
)
def test_offload(text: str | None, expected: dict[TierName, TierRequest]) -> None:
    found = parse_offload(EngineConfig(offload=text))
    assert found == expected
    assert list(found) == list(expected), "hot to cold"


@pytest.mark.parametrize(
    "text",
    [
        "disk",
        "gpu",
        "cpu,disk",
        "CPU",
        "cpu,cpu",
        "nvme=1GiB,cpu,nvme=2GiB",
        "cpu=16GiB:/path",
        "cpu=big",
        "nvme=-1GiB",
        "cpu=0",
        "nvme=1GiB GiB:/path",
        "nvme:/path",
        "auto,cpu",
        "none",
        "",
        " , ",
    ],
)
def test_bad_offloads_name_the_option(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_offload(EngineConfig(offload=text))
    assert caught.value.option == "offload"
    assert caught.value.fix


def test_auto_without_prefix_caching_has_no_tiers() -> None:
    assert parse_offload(EngineConfig(offload="auto", enable_prefix_caching=False)) == {}
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        EngineConfig(offload="cpu", enable_prefix_caching=False)


def test_a_bad_offload_shows_before_the_model_is_looked_for() -> None:
    from tierkv.engine.build import build_engine

    with pytest.raises(ConfigError) as caught:
        build_engine(EngineConfig(model="/there/is/none", offload="cpu,disk"))
    assert caught.value.option == "offload"


def test_oversubscribe_needs_a_tier() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(oversubscribe=True)
    assert caught.value.option == "oversubscribe"
    assert EngineConfig(oversubscribe=True, offload="cpu").oversubscribe


# ---------------------------------------------------------------------- the command line


def served(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> EngineConfig:
    """The engine options that `tierkv serve` would start with."""
    found: list[EngineConfig] = []

    def remember(options: Any, config: EngineConfig, runner: Any) -> int:
        found.append(config)
        return 0

    monkeypatch.setattr(serve, "serve", remember)
    namespace: argparse.Namespace = serve.make_parser().parse_args(list(arguments))
    assert serve.run(namespace) == 0
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "auto"),
        (("--offload", "cpu"), "cpu"),
        (("--kv-offload", "nvme=1GiB:/x"), "nvme=1GiB:/x"),
        (("--no-offload",), None),
        (("--offload", "cpu", "--no-offload"), None),
    ],
)
def test_flags_of_serve(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], expected: str | None
) -> None:
    assert served(monkeypatch, *arguments).offload == expected


def test_a_config_file_wins_over_the_default_of_serve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("offload: cpu=1GiB\n")
    assert served(monkeypatch, "--config", str(file)).offload == "cpu=1GiB"
    assert served(monkeypatch, "--config", str(file), "--kv-offload", "nvme").offload == "nvme"
    assert served(monkeypatch, "--config", str(file), "--no-offload").offload is None


def test_oversubscribe_without_tiers_is_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--no-offload", "--oversubscribe"]) == 2
    error = capsys.readouterr().err
    assert "--oversubscribe" in error
    assert "Traceback" not in error


# ---------------------------------------------------------------------- opening


@pytest.fixture
def layout() -> KVLayout:
    return KVLayout(2, 2, 16, 16, "float32")


def opened(layout: KVLayout, **options: Any) -> LowerTierSetup | None:
    pool = GpuPool(layout, 8, torch.device("cpu"))
    config = EngineConfig(**options)
    return open_tiers(config, layout, b"model", pool, MeasuredCost(layout.block_bytes))


def store_of(path: Path) -> Path:
    """The one store below a path."""
    (found,) = [child for child in path.iterdir() if child.is_dir()]
    return found


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"offload": "cpu=1KiB"}, "cpu_cache_size"),
        ({"offload": "cpu", "cpu_cache_size": 100}, "cpu_cache_size"),
        ({"offload": "nvme=1MiB"}, "nvme_cache_size"),
        ({"offload": "cpu,nvme", "nvme_cache_size": "8MiB"}, "nvme_cache_size"),
    ],
)
def test_too_small_for_a_block(
    layout: KVLayout, tmp_path: Path, options: dict[str, Any], option: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(layout, nvme_path=str(tmp_path), **options)
    assert caught.value.option == option


def test_auto_leaves_out_what_cannot_be_had(
    layout: KVLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Too little of either: one tier only, with a warning for each that is missing."""
    options = {"offload": "auto", "cpu_cache_size": 100, "nvme_cache_size": 100}
    with caplog.at_level(logging.WARNING):
        assert opened(layout, nvme_path=str(tmp_path), **options) is None
    assert "cpu_cache_size" in caplog.text and "nvme_cache_size" in caplog.text
    with pytest.raises(ConfigError) as caught:
        opened(layout, nvme_path=str(tmp_path), oversubscribe=True, **options)
    assert caught.value.option == "oversubscribe"


def test_auto_with_the_memory_tier_only(layout: KVLayout, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = {"cpu_cache_size": "1MiB", "nvme_path": str(tmp_path / "file")}
    setup = opened(layout, offload="auto", **options)
    assert setup is not None
    assert [spec.name for spec in setup.specs] == [CPU]
    setup.close()
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        opened(layout, offload="cpu,nvme", **options)
    assert caught.value.option == "nvme_path"


def test_the_owner_of_a_store_is_named(layout: KVLayout, tmp_path: Path) -> None:
    options = {"nvme_path": str(tmp_path), "nvme_cache_size": "64MiB", "cpu_cache_size": "1MiB"}
    first = opened(layout, offload="nvme", **options)
    assert first is not None
    with pytest.raises(ConfigError, match=f"process {os.getpid()} is using it") as caught:
        opened(layout, offload="cpu,nvme", **options)
    assert caught.value.option == "nvme_path"
    second = opened(layout, offload="auto", **options)
    assert second is not None
    assert [spec.name for spec in second.specs] == [CPU]
    second.close()
    first.close()
    first.close()
    assert holder(store_of(tmp_path)) == "nobody"


@pytest.mark.parametrize("option", ["eviction_policy", "admission_policy"])
def test_a_failure_after_the_store_was_opened_lets_it_go(
    layout: KVLayout, tmp_path: Path, option: str
) -> None:
    options: dict[str, Any] = {option: "nvme=none-such"}
    with pytest.raises(ConfigError) as caught:
        opened(layout, offload="nvme=64MiB", nvme_path=str(tmp_path), **options)
    assert caught.value.option == option
    assert holder(store_of(tmp_path)) == "nobody"


@pytest.mark.parametrize("offload", ["auto", "nvme", "cpu,nvme"])
def test_kvikio_must_be_there_if_it_is_named(
    layout: KVLayout, tmp_path: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvikio", None)
    options = {"nvme_path": str(tmp_path), "nvme_cache_size": "64MiB", "cpu_cache_size": "1MiB"}
    with pytest.raises(ConfigError, match=r"cannot be imported.*use posix") as caught:
        opened(layout, offload=offload, nvme_io="kvikio", **options)
    assert (caught.value.option, list(tmp_path.iterdir())) == ("nvme_io", [])
    with pytest.raises(ConfigError, match="choose one of posix, kvikio"):
        EngineConfig(nvme_io="aio")


def test_an_engine_that_does_not_work_lets_the_store_go(
    layout: KVLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, num_bytes: int) -> IoEngine:
        raise ConfigError("nvme_io", "kvikio", "does not work here")

    monkeypatch.setattr(tiers, "io_engine", lambda config: refuse)
    with pytest.raises(ConfigError, match="does not work here"):
        opened(layout, offload="nvme=64MiB", nvme_path=str(tmp_path))
    assert holder(store_of(tmp_path)) == "nobody"


# ---------------------------------------------------------------------- default places and sizes


def test_the_default_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERKV_KV_DIR", "/somewhere")
    assert default_path() == Path("/somewhere")
    monkeypatch.delenv("TIERKV_KV_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_path() == Path("/cache/tierkv/kv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_path() == Path("~/.cache/tierkv/kv")


def test_a_user_without_a_home_has_no_default_path(
    layout: KVLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with an arbitrary user id."""

    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TIERKV_KV_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    setup = opened(layout, offload="auto", cpu_cache_size="1MiB")
    assert setup is not None
    assert [spec.name for spec in setup.specs] == [CPU]
    setup.close()
    with pytest.raises(ConfigError) as caught:
        opened(layout, offload="nvme")
    assert caught.value.option == "nvme_path"


def test_a_path_that_may_not_be_looked_at(
    layout: KVLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", forbidden)
    with pytest.raises(ConfigError, match="Permission denied") as caught:
        opened(layout, offload="nvme", nvme_path=str(tmp_path))
    assert caught.value.option == "nvme_path"


def test_the_default_size_does_not_shrink_with_what_it_took(
    layout: KVLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of a tenth of the free disk leaves less of it free."""
    total = 640 << 20
    usage = type("Usage", (), {})

    def disk_usage(path: Path) -> Any:
        found = usage()
        stores = tmp_path.iterdir()
        found.free = total - sum(tiers.disk_bytes(store) for store in stores if store.is_dir())
        return found

    monkeypatch.setattr(tiers.shutil, "disk_usage", disk_usage)
    sizes = []
    for _ in range(3):
        setup = opened(layout, offload="nvme", nvme_path=str(tmp_path))
        assert setup is not None
        sizes.append(setup.specs[0].capacity)
        setup.close()
    assert sizes[0] > 1000
    assert sizes[0] == sizes[1] == sizes[2]


# ---------------------------------------------------------------------- letting go


def test_a_fork_does_not_close_the_store(layout: KVLayout, tmp_path: Path) -> None:
    setup = opened(layout, offload="nvme=64MiB", nvme_path=str(tmp_path))
    assert setup is not None
    before = os.getpid
    try:
        os.getpid = lambda: -1
        setup.close()
    finally:
        os.getpid = before
    assert holder(store_of(tmp_path)) == str(os.getpid())
    setup.close()
    assert holder(store_of(tmp_path)) == "nobody"


def test_a_store_that_does_not_answer_is_left_behind(
    layout: KVLayout,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setup = opened(layout, offload="nvme=64MiB", nvme_path=str(tmp_path))
    assert setup is not None
    close = tiers.QuarantinedStore.close

    def slow_close(store: tiers.QuarantinedStore) -> None:
        time.sleep(0.5)
        close(store)

    monkeypatch.setattr(tiers, "_CLOSE_S", 0.1)
    monkeypatch.setattr(tiers.QuarantinedStore, "close", slow_close)
    start = time.monotonic()
    setup.close()
    assert time.monotonic() - start < 0.4
    assert "does not answer" in caplog.text
    while holder(store_of(tmp_path)) != "nobody":
        assert time.monotonic() - start < 20
        time.sleep(0.05)
