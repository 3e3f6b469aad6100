"""Running, stopping, repeating and sharing in the playground, in a real browser."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from playground_fake import Fake, chain, endless
from playground_page import (  # noqa: F401 fixtures
    Page,
    chromium_fixture,
    fake_fixture,
    page_fixture,
    site_fixture,
)
from playwright.sync_api import expect

# ---- running, stopping, repeating ----


def test_escape_aborts_the_request_at_the_server(page: Page):
    page.fake.script = endless
    page.page.keyboard.press("Control+Enter")
    expect(page.part(1, "phase")).to_have_text("thinking")
    page.page.keyboard.press("Escape")
    page.settled()
    expect(page.part(0, "phase")).to_have_text("stopped")
    for _ in range(200):
        if page.fake.aborted == 2:
            break
        page.page.wait_for_timeout(50)
    assert page.fake.aborted == 2
    expect(page.part(0, "answerNote")).to_have_text("Stopped.")


def test_one_column_stops_alone(page: Page):
    page.fake.script = endless
    page.page.keyboard.press("Control+Enter")
    expect(page.part(0, "phase")).to_have_text("thinking")
    expect(page.part(1, "phase")).to_have_text("thinking")
    page.part(0, "stop").click()
    expect(page.part(0, "phase")).to_have_text("stopped")
    expect(page.part(1, "phase")).to_have_text("thinking")
    page.page.locator("#stop").click()
    expect(page.part(1, "phase")).to_have_text("stopped")


def test_re_running_exactly_sends_the_reported_seed_and_compares(page: Page):
    page.run()
    seed = int(page.facts(1)["Seed"])
    assert "seed" not in page.fake.requests[1]["cot"]
    page.part(1, "rerun").click()
    expect(page.part(1, "verdict")).to_have_text("Identical to the run before.")
    again = page.fake.requests[2]
    assert again["cot"] == {**page.fake.requests[1]["cot"], "seed": seed}
    page.fake.words = page.fake.words[1:] + page.fake.words[:1]

    async def other(fake: Fake, body: dict[str, Any]):
        async for chunk in chain(fake, body):
            for step in (chunk["choices"] or [{}])[0].get("cot", {}).get("steps", [])[5:]:
                step["id"] += 1
            if chunk["choices"] and "content" in chunk["choices"][0]["delta"]:
                chunk["choices"][0]["delta"]["content"] = "?"
            yield chunk

    page.fake.script = other
    page.part(1, "rerun").click()
    expect(page.part(1, "verdict")).to_contain_text("Differs from the run before")


def test_locking_the_seed_repeats_it_in_the_next_run(page: Page):
    page.run()
    seed = int(page.facts(1)["Seed"])
    page.part(1, "lock").click()
    expect(page.part(1, "summary")).to_contain_text(f"seed {seed}")
    page.run()
    sent = {body["cot_mode"]: body["cot"].get("seed") for body in page.fake.requests[2:]}
    assert sent == {"hard": None, "soft": seed}


def test_columns_can_be_added_copied_changed_and_removed(page: Page):
    page.page.locator("#add").click()
    expect(page.part(2, "mode")).to_have_value("fuzzy")
    page.part(2, "duplicate").click()
    page.part(3, "settings").locator("summary").click()
    page.column(3).locator("[data-field='cot.temperature']").fill("0.7")
    page.column(3).locator("[data-field='cot.top_k']").fill("16")
    page.part(0, "remove").click()
    expect(page.page.locator(".column")).to_have_count(3)
    page.run()
    sent = [(body["cot_mode"], body["cot"].get("temperature")) for body in page.fake.requests]
    assert sorted(sent, key=str) == [("fuzzy", 0.7), ("fuzzy", None), ("soft", None)]
    assert [b["cot"]["top_k"] for b in page.fake.requests if "top_k" in b["cot"]] == [16]


def test_every_field_reaches_the_request(page: Page):
    page.page.locator("#system-box summary").click()
    page.page.locator("#system").fill("Be brief.")
    page.page.locator("#model").select_option("other")
    page.part(0, "remove").click()
    page.part(0, "mode").select_option("mixed")
    page.part(0, "settings").locator("summary").click()
    page.part(0, "policy").select_option("entropy")
    column, everything = page.column(0), page.page.locator("#shared-fields")
    for field_name, value in {
        "temperature": "0.6", "noise_scale": "0.1", "top_k": "0", "top_p": "0.9", "min_p": "0.01",
        "max_think_tokens": "99", "policy_params.low": "0.25", "policy_params.high": "0.75",
    }.items():  # fmt: skip
        column.locator(f"[data-field='cot.{field_name}']").fill(value)
    column.locator("[data-field='cot']").fill('{"min_think_tokens": 4}')
    everything.locator("[data-field='cot.seed']").fill("9007199254740991")
    everything.locator("[data-field=max_tokens]").fill("300")
    everything.locator("[data-field=temperature]").fill("0.8")
    everything.locator("[data-field='cot.end_strings']").fill("</think>\nDone.")
    page.run()
    (body,) = page.fake.requests
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", 300, 0.8)
    assert body["cot"] == {
        "record": "top", "record_top": 8, "seed": 9007199254740991, "max_think_tokens": 99,
        "end_strings": ["</think>", "Done."], "temperature": 0.6, "noise_scale": 0.1, "top_k": 0,
        "top_p": 0.9, "min_p": 0.01, "min_think_tokens": 4, "policy": "entropy",
        "policy_params": {"low": 0.25, "high": 0.75},
    }  # fmt: skip


def test_mode_hard_sends_no_noise_even_if_some_was_typed(page: Page):
    page.part(1, "settings").locator("summary").click()
    page.column(1).locator("[data-field='cot.noise_scale']").fill("0.5")
    page.part(1, "mode").select_option("hard")
    page.run()
    assert all("noise_scale" not in body["cot"] for body in page.fake.requests)


# ---- taking it elsewhere ----

HARD_TEXT = 'it\'s "quoted" $(touch /tmp/x) `x` \\n %s \n second line 🙂 \u2028 end'


def copied(page: Page, name: str) -> str:
    """What the button put on the clipboard."""
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.part(1, name).click()
    expect(page.page.locator("#status")).to_contain_text("copied")
    return page.page.evaluate("navigator.clipboard.readText()")


def test_the_curl_command_repeats_the_run(page: Page):
    page.page.locator("#prompt").fill(HARD_TEXT)
    page.run()
    seed = int(page.facts(1)["Seed"])
    command = copied(page, "curl")
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["choices"][0]["cot"]["seed"] == seed, done.stderr
    sent = page.fake.requests[-1]
    assert sent["messages"][0]["content"] == HARD_TEXT
    assert sent["cot"] == {"max_think_tokens": 192, "seed": seed} and "stream" not in sent


def test_the_python_code_repeats_the_run(page: Page):
    page.page.locator("#prompt").fill(HARD_TEXT)
    page.run()
    seed = int(page.facts(1)["Seed"])
    code = copied(page, "python")
    ast.parse(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert f"'seed': {seed}" in done.stdout, done.stderr
    sent = page.fake.requests[-1]
    assert sent["messages"][0]["content"] == HARD_TEXT
    assert sent["cot"]["seed"] == seed and sent["cot_mode"] == "soft"


def test_a_key_is_not_copied_into_commands(page: Page):
    page.page.evaluate("sessionStorage.setItem('softvllm.api_key', 's3cret')")
    command = copied(page, "curl")
    assert "$OPENAI_API_KEY" in command and "s3cret" not in command
    assert "s3cret" not in copied(page, "python")


def test_a_link_brings_everything_back(page: Page):
    page.page.locator("#prompt").fill(HARD_TEXT)
    page.part(1, "mode").select_option("fuzzy")
    page.part(1, "settings").locator("summary").click()
    page.column(1).locator("[data-field='cot.top_p']").fill("0.9")
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.locator("#share").click()
    link = page.page.evaluate("navigator.clipboard.readText()")
    page.page.goto("about:blank")
    page.page.goto(link)
    expect(page.page.locator("#prompt")).to_have_value(HARD_TEXT)
    expect(page.part(1, "mode")).to_have_value("fuzzy")
    assert page.column(1).locator("[data-field='cot.top_p']").input_value() == "0.9"


def test_without_a_clipboard_the_text_is_offered_to_copy_by_hand(page: Page):
    page.page.evaluate(
        "const none = {writeText: () => Promise.reject()};"
        "Object.defineProperty(navigator, 'clipboard', {value: none})"
    )
    page.part(1, "curl").click()
    dialog = page.page.locator("#copy-dialog")
    expect(dialog).to_be_visible()
    expect(dialog.locator("textarea")).to_have_value(re.compile(r"^curl 'http://127\.0\.0\.1"))
    page.page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
