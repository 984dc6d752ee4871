"""Check that everything a package requires is installed, in the versions it asks for.

    python environments/check_requirements.py megatron-vlm

``pip check`` would complain about other packages of a container image too. Exit code 1, and a line for
each requirement that is not met.
"""

import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def unmet_requirements(package: str) -> list[str]:
    """Return what ``package`` and all that it needs miss here, one line each."""
    problems: list[str] = []
    queue = [(Requirement(package), "the command line")]
    seen = set()
    while queue:
        requirement, asked_by = queue.pop()
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement} is not installed ({asked_by} needs it)")
            continue
        if not requirement.specifier.contains(found.version, prereleases=True):
            problems.append(f"{requirement} is needed by {asked_by}, but {found.version} is installed")
        node = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if node in seen:
            continue
        seen.add(node)
        for text in found.requires or []:
            child = Requirement(text)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if child.marker is None or any(child.marker.evaluate(extra) for extra in extras):
                queue.append((child, requirement.name))
    return problems


if __name__ == "__main__":
    lines = unmet_requirements(sys.argv[1])
    print("\n".join(lines) or f"{sys.argv[1]}: all requirements are met")
    sys.exit(1 if lines else 0)
