"""The parameter `fields`: where metadata is asked for, too, and where objects have to be looked at."""

import pytest

from proxy.profiles.gcs.routes import operation_of
from proxy.profiles.gcs.selections import Selection
from tests.proxy.profiles.gcs.upload_world import head

LIST = "/storage/v1/b/my%2Dbox/o"


def of(target: str, **fields: str) -> Selection:
    its = head("GET", target, {name.replace("_", "-"): value for name, value in fields.items()})
    return Selection.of(its, operation_of(its.method, its.target, its.fields))


@pytest.mark.parametrize("query", ["", "?prefix=a", "?fields=", "?fields=*", "?fields=%2A"])
def test_no_selection(query: str) -> None:
    assert of(LIST + query) == Selection(bucket="my-box")


@pytest.mark.parametrize(
    ("target", "wider"),
    [
        (f"{LIST}?fields=items(name,size)", f"{LIST}?fields=items(metadata,name,size)"),
        (
            f"{LIST}?a=b%26&fields=items%28name%2Csize%29%2CnextPageToken&c",
            f"{LIST}?a=b%26&fields=items(metadata,name,size),nextPageToken&c",
        ),
        (f"{LIST}?$fields=prefixes,items(size)", f"{LIST}?$fields=prefixes,items(metadata,size)"),
        (f"{LIST}/a%2Fb?fields=size,name", f"{LIST}/a%2Fb?fields=metadata,size,name"),
    ],
)
def test_metadata_is_asked_for_too(target: str, wider: str) -> None:
    assert of(target) == Selection(bucket="my-box", target=wider, adds_metadata=True)


@pytest.mark.parametrize("query", ["fields=items(name,metadata,size)", "fields=items(metadata)"])
def test_it_is_there_already(query: str) -> None:
    assert of(f"{LIST}?{query}") == Selection(bucket="my-box")


@pytest.mark.parametrize(
    "query",
    [
        "fields=items/size",
        "fields=items(name),items(size)",
        "fields=nextPageToken",
        "fields=items/(size)",
        "fields=myitems(size)",
        "fields=items(size)&$fields=items(name)",
    ],
)
def test_what_is_written_otherwise_stays(query: str) -> None:
    assert of(f"{LIST}?{query}") == Selection(bucket="my-box", is_partial=True)


@pytest.mark.parametrize(
    "query", ["fields=owner/entity", "fields=owner(entity)", "fields=items(size)", "fields=a,"]
)
def test_what_is_written_otherwise_of_one_object_stays(query: str) -> None:
    assert of(f"{LIST}/a?{query}") == Selection(bucket="my-box", is_partial=True)


def test_a_selection_in_the_head() -> None:
    assert of(LIST, x_goog_fieldmask="items(size)") == Selection(bucket="my-box", is_partial=True)


@pytest.mark.parametrize("query", ["fields=items(size)", "fields=items(metadata)", "fields=*"])
def test_a_selection_in_the_head_and_another_in_the_query(query: str) -> None:
    """Which of them counts the service knows."""
    both = of(f"{LIST}?{query}", x_goog_fieldmask="items(size)")
    assert both == Selection(bucket="my-box", is_partial=True)
