"""Which groups of devices may be shown by themselves: none that is small, and none by subtraction.

What a group of a handful of devices did is nearly what one of them did. The numbers are not
noised, so this is no differential privacy: it keeps single devices out of model cards and pages
that show groups, and nothing more. The hub has the counts by device.
"""

from collections.abc import Collection, Mapping


def shown(groups: Mapping[str, Collection[str]], least: int) -> list[str]:
    """Return the names of the ``groups`` (name to devices) that are shown, in their order.

    Each has ``least`` devices or more. All groups together are shown elsewhere, so the devices of
    those that are left out must be as many, or none: else the smallest of those shown is left
    out as well, until they are.
    """
    kept = {name for name, who in groups.items() if len(set(who)) >= least}
    while kept:
        rest = {device for name, who in groups.items() if name not in kept for device in who}
        if not rest or len(rest) >= least:
            break
        kept.remove(min(kept, key=lambda name: (len(set(groups[name])), name)))
    return [name for name in groups if name in kept]
