"""The licence of the weights that an adapter needs: which ones forbid commercial use, and where to look one up."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from point_peft.errors import HubError, PointPeftError, quoted
from point_peft.hub.asking import Unreachable, ask
from point_peft.hub.pulling import Token, is_repo_id, model_info

LICENCE = r"[a-z0-9][a-z0-9.+\-]*"
"""An identifier of the Hub, https://huggingface.co/docs/hub/repositories-licenses, or a name like them."""
_NON_COMMERCIAL = {"nc", "noncommercial", "research", "amlr"}
"""Words of the identifiers of licences that forbid commercial use."""
_OF_THE_HUB = re.compile(
    r"cc-by-nc(-nd|-sa)?-[234]\.0|fair-noncommercial-research-license|intel-research|h-research|apple-amlr"
)
"""Those of them that the Hub knows; it refuses a card that states an identifier which it does not know."""


def check_licence(licence: str | None) -> None:
    """Raise an error for a licence of the base that is stated in other words than the Hub's."""
    if licence is not None and not re.fullmatch(LICENCE, licence):
        raise PointPeftError(
            f"base_license is {quoted(licence)}; allowed: an identifier as the Hub has them, such as 'cc-by-nc-4.0' "
            "or 'mit', in small letters, digits, '.', '+' and '-'"
        )


def forbids_commerce(licence: str) -> bool:
    """True if the identifier of a licence says that it forbids commercial use."""
    return not _NON_COMMERCIAL.isdisjoint(licence.split("-"))


def card_fields(licence: str) -> dict[str, str]:
    """The fields of a card that state a licence which forbids commercial use."""
    known = _OF_THE_HUB.fullmatch(licence) is not None
    return {"license": licence} if known else {"license": "other", "license_name": licence}


def stated_licences(fields: Mapping[str, Any]) -> list[str]:
    """The licences that the fields of a card state; one that is other than the Hub's by its name."""
    value = fields.get("license")
    stated = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
    name = fields.get("license_name")
    return [name if entry == "other" and isinstance(name, str) else entry for entry in stated]


def licence_on_hub(base: object, revision: str | None, token: Token) -> str | None:
    """The licence that the card of a base's own repository states, that which forbids most; None: none is known.

    Only "owner/name" is asked for, and where that cannot be answered, a warning says so: a push is not to fail for it.
    """
    if not isinstance(base, str) or "/" not in base or not is_repo_id(base):
        return None
    try:
        info = ask(base, revision, lambda: model_info(base, revision, token))
    except (HubError, Unreachable) as error:
        warnings.warn(f"the licence of the weights of '{base}' is not known, state base_license: {error}", stacklevel=2)
        return None
    fields: Mapping[str, Any] = {} if info.card_data is None else info.card_data.to_dict()  # type: ignore[no-untyped-call]
    found = [licence for licence in stated_licences(fields) if re.fullmatch(LICENCE, licence)]
    return max(found, key=forbids_commerce, default=None)
