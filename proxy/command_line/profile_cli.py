"""`sealgate profile`: what becomes of a cloud service's operations."""

from typing import Annotated

import typer

from proxy.command_line.operating import options_of, usage_error
from proxy.profiles import PROFILES, UnknownProfileError, profile_named

profile_app = typer.Typer(
    no_args_is_help=True, help="Profiles: what becomes of a cloud service's operations."
)


@profile_app.command("list")
def profile_list(context: typer.Context) -> None:
    """The profiles there are."""
    found = [PROFILES[name] for name in sorted(PROFILES)]
    options_of(context).emit(
        {"profiles": [profile.describe() for profile in found]},
        lambda: "\n".join(f"{profile.name:12} {profile.summary}" for profile in found),
    )


@profile_app.command("show", epilog="Example: sealgate profile show generic")
def profile_show(context: typer.Context, name: Annotated[str, typer.Argument(metavar="PROFILE")]) -> None:
    """What becomes of each operation, and what stops working on ciphertext."""
    profile = profile_named(check_profile(name))
    options_of(context).emit(profile.describe(), profile.text)


def check_profile(name: str) -> str:
    """*name*, if there is such a profile. CommandError if not."""
    try:
        return profile_named(name).name
    except UnknownProfileError as error:
        raise usage_error(error, "see `sealgate profile list`") from None
