"""Every public name is in the API page, and nothing else is."""

import re

from documents import ROOT, public_objects

API = (ROOT / "docs" / "api.md").read_text()


def documented_names() -> list[str]:
    """The names in the `api` blocks of docs/api.md."""
    return " ".join(re.findall(r"^```\{api\}\n(.*?)^```", API, re.M | re.S)).split()


def test_every_public_name_is_documented():
    missing = set(public_objects()) - set(documented_names())
    assert not missing, f"add to an `api` block of docs/api.md: {sorted(missing)}"


def test_every_documented_name_exists_once():
    names = documented_names()
    assert sorted(names) == sorted(set(names))
    assert set(names) <= set(public_objects())
