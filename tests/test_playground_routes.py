"""The playground's files: served whole, revalidated, under a policy that stops injected script."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server import playground

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "clients" / "playground"
FILES = sorted(path.name for path in FOLDER.iterdir())


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    playground.attach(app)
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize("name", [None, *FILES])
def test_every_file_comes_with_its_type_and_the_policy(client, name):
    response = client.get("/playground" + (f"/{name}" if name else ""))
    assert response.status_code == 200
    assert response.content == (FOLDER / (name or "index.html")).read_bytes()
    expected = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg"}
    assert response.headers["content-type"].startswith(expected[(name or ".html").split(".")[-1]])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert "unsafe" not in policy and "http" not in policy


def test_an_unchanged_file_is_not_sent_again(client):
    etag = client.get("/playground/app.js").headers["etag"]
    for sent in (etag, f"W/{etag}", f'"old", {etag}', "*"):
        again = client.get("/playground/app.js", headers={"If-None-Match": sent})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    stale = client.get("/playground/app.js", headers={"If-None-Match": '"old"'})
    assert stale.status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "..%2fapp.js", "%2e%2e/pyproject.toml", "a/b.js"])
def test_other_names_are_not_found(client, name):
    assert client.get(f"/playground/{name}").status_code == 404


def test_head_is_answered_and_other_methods_are_not(client):
    assert client.head("/playground").status_code == 200
    assert client.post("/playground").status_code == 405


def test_the_slash_leads_back_relatively_so_that_a_prefix_survives(client):
    response = client.get("/playground/")
    assert (response.status_code, response.headers["location"]) == (307, "../playground")


def test_an_installation_without_the_files_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(playground, "FOLDER", tmp_path / "playground")
    with pytest.raises(RuntimeError, match="install it again"):
        playground.attach(FastAPI())


def test_the_page_names_only_relative_files_that_exist():
    html = (FOLDER / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert named and all(name.startswith("playground/") for name in named)
    for path in FOLDER.glob("*.js"):
        named += [
            "playground/" + name for name in re.findall(r'from "\./([^"]+)"', path.read_text())
        ]
    assert set(named) - {f"playground/{name}" for name in FILES} == set()
    unused = set(FILES) - {name.removeprefix("playground/") for name in named} - {"index.html"}
    assert unused == set()


@pytest.mark.parametrize("name", FILES)
def test_no_file_has_inline_handlers_html_sinks_or_foreign_urls(name):
    text = (FOLDER / name).read_text()
    assert not re.search(r"\son[a-z]+\s*=\s*[\"']", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"'`)]*", text))
    assert urls <= {"http://www.w3.org/2000/svg"}
    assert "<style" not in text and 'style="' not in text


def test_the_wheel_carries_every_file():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = config["package-data"]["clients"]
    packed = {path.name for pattern in patterns for path in (ROOT / "clients").glob(pattern)}
    assert packed >= set(FILES)
