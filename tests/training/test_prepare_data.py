"""Raw data of a recipe: a cache folder for each set, and the automatic views."""

from pathlib import Path

from anytoken.data.views import auto_views, held_kinds, is_used
from anytoken.training.prepare_data import cache_name

KINDS = ("text", "image", "speech")


def test_no_two_sources_share_a_cache(tmp_path: Path) -> None:
    paths = [
        "set.v1",
        "set.v2",
        "x/a",
        "x-a",
        "x/a.jsonl",
        "x/a.csv",
        "/x/a",
        "hf:x/a",
        "hf:x/b/a",
        "a*.tar",
        "ä",
        "a",
    ]
    names = [cache_name(str(path)) for path in paths]
    assert len(set(names)) == len(paths) and not any("/" in name or name.startswith(".") for name in names)
    assert cache_name("set.jsonl") == cache_name(str(Path("set.jsonl").absolute()))


def test_automatic_views_join_what_a_record_holds_together() -> None:
    def views(*held: set[str]) -> dict[str, float]:
        return auto_views({frozenset(one) for one in held}, KINDS)

    assert views({"text", "image"}) == {"text->image": 1.0, "image->text": 1.0}
    assert set(views({"text", "image"}, {"text", "speech"})) == {
        "text->image", "image->text", "text->speech", "speech->text",
    }  # fmt: skip
    assert views({"messages"}) == {"messages": 1.0}
    assert views({"text"}) == {"->text": 1.0} and views({"image"}) == {} and views() == {}
    assert not is_used(frozenset({"text"}), views({"text", "image"}, {"text"}))
    assert held_kinds({"text": "a", "image": None}, KINDS) == {"text"}
