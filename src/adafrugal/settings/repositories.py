"""Names that are repositories of the hub, or paths."""


def is_path(name: str, needs_owner: bool = True) -> bool:
    """Return whether a name can only be a path: a hub repository is owner/name, or name alone unless `needs_owner`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (needs_owner and "/" not in name)
