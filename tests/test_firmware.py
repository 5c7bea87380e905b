"""What the Pi's firmware answers, as captured texts, and the asking itself against a fake vcgencmd."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from device import facts, firmware

VERSION = """Aug 30 2024 19:17:39\x20
Copyright (c) 2012 Broadcom
version 2808975b80f5a0b1c2d3e4f5061728394a5b6c7d (clean) (release) (start)
"""

# Pi 5: rails in the firmware's order and layout; only those with both a current and a voltage carry measured power.
PMIC = """ 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.20000000A
  VDD_CORE_A current(7)=2.50000000A
      HDMI_A current(22)=0.02000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.80000000V
      HDMI_V volt(23)=5.00000000V
     EXT5V_V volt(24)=5.10000000V
      BATT_V volt(25)=0.00000000V
"""
PMIC_W = 0.1 * 3.7 + 0.2 * 3.3 + 2.5 * 0.8 + 0.02 * 5.0


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (firmware.parse_clock_mhz, "frequency(48)=1500345728\n", 1500.345728),
        (firmware.parse_clock_mhz, "frequency(0)=0\n", None),
        (firmware.parse_clock_mhz, "VCHI initialization failed\n", None),
        (firmware.parse_clock_mhz, None, None),
        (firmware.parse_khz, "1800000\n", 1800.0),
        (firmware.parse_khz, "<unknown>\n", None),
        (firmware.parse_khz, "²\n", None),
        (firmware.parse_khz, None, None),
        (firmware.parse_throttled, "throttled=0x50005\n", 0x50005),
        (firmware.parse_throttled, "throttled=0x0\n", 0),
        (firmware.parse_throttled, "50005\n", 0x50005),
        (firmware.parse_throttled, "0\n", 0),
        (firmware.parse_throttled, "error=1 error_msg=x\n", None),
        (firmware.parse_throttled, "", None),
        (firmware.parse_throttled, None, None),
        (firmware.parse_millidegrees, "48312\n", 48.312),
        (firmware.parse_millidegrees, "-5000", -5.0),
        (firmware.parse_millidegrees, "", None),
        (firmware.parse_millidegrees, None, None),
        (firmware.parse_alarm, "1\n", True),
        (firmware.parse_alarm, "0\n", False),
        (firmware.parse_alarm, None, None),
        (firmware.parse_version, VERSION, "2808975b80f5 of Aug 30 2024"),
        (firmware.parse_version, VERSION.replace("Aug 30", "Jun  1"), "2808975b80f5 of Jun 1 2024"),
        (firmware.parse_version, "error=1\n", None),
        (firmware.parse_version, None, None),
        (firmware.parse_power_w, "", None),
        (firmware.parse_power_w, "     EXT5V_V volt(24)=5.10000000V\n", None),
        (firmware.parse_power_w, 'error=1 error_msg="Command not registered"\n', None),
        (firmware.parse_power_w, None, None),
    ],
)
def test_parsers(parse: Any, text: str | None, value: object) -> None:
    assert parse(text) == value


def test_power_is_the_sum_over_rails_with_current_and_voltage() -> None:
    assert firmware.parse_power_w(PMIC) == pytest.approx(PMIC_W)


@pytest.fixture
def vcgencmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tool = tmp_path / "vcgencmd"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers = {
        "measure_clock arm": "frequency(48)=1500345728",
        "get_throttled": "throttled=0x50005",
        "version": VERSION,
        "pmic_read_adc": PMIC,
    }
    cases = "".join(f"\"{question}\") cat <<'END'\n{answer}\nEND\n;;\n" for question, answer in answers.items())
    tool.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}*) exit 1;;\nesac\n')
    tool.chmod(0o755)
    return tool


def test_vcgencmd_is_asked_when_there_is_one(vcgencmd: Path) -> None:
    now = facts.collect()
    assert (now.clock_mhz, now.throttled_bits) == (1500.345728, 0x50005)
    assert now.firmware == "2808975b80f5 of Aug 30 2024"
    watts, cpu_s = firmware.power_w()
    assert watts == pytest.approx(PMIC_W)
    assert 0 < cpu_s < 1
    vcgencmd.write_text("#!/bin/sh\nexit 255\n")
    assert facts.collect().throttled_bits is None


def test_firmware_that_hangs_is_left_alone(vcgencmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vcgencmd.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(firmware, "ANSWER_WITHIN_S", 0.2)
    begin_s = time.monotonic()
    assert firmware.ask("version")[0] is None
    assert time.monotonic() - begin_s < 5


def test_no_vcgencmd_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert firmware.ask("version") == (None, 0.0)


def test_sysfs_bits_count_only_where_the_kernel_refreshes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Without its voltage monitor the kernel never asks the firmware again, and its bits stay what they were."""
    for cached in (firmware._throttled_file, firmware._voltage_monitor):
        cached.cache_clear()
        request.addfinalizer(cached.cache_clear)
    monkeypatch.setattr(firmware, "_PLATFORM", tmp_path / "platform")
    monkeypatch.setattr(firmware, "_HWMON", tmp_path / "hwmon")
    bits = tmp_path / "platform" / "soc" / "soc:firmware"
    bits.mkdir(parents=True)
    (bits / "get_throttled").write_text("50000\n")
    assert firmware.cached_throttled_bits() is None
    firmware._voltage_monitor.cache_clear()
    for name, text in {"name": "rpi_volt\n", "in0_lcrit_alarm": "1\n"}.items():
        (tmp_path / "hwmon" / "hwmon1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hwmon" / "hwmon1" / name).write_text(text)
    assert firmware.cached_throttled_bits() == 0x50000
    assert firmware.under_voltage_alarm() is True
