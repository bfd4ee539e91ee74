"""Sections of the cluster file for containers, and how a command is put into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from launcher.cluster_problems import path_problems
from mpotrain.schema import Check, collect_problems, config


@config
class NoContainer:
    """Ranks run on the node itself."""

    kind: Literal["none"] = "none"
    """Tag of this variant."""

    def step_options(self, folder: str) -> tuple[str, ...]:
        """Return further options of srun for a step that works in `folder`: none."""
        del folder  # that of the batch script
        return ()

    def inside(self, argv: tuple[str, ...], folder: str | None = None) -> tuple[str, ...]:
        """Return the command that runs `argv` inside."""
        del folder
        return argv

    def shows(self, folder: Path) -> bool:
        """Whether a folder of the node can be seen inside: always."""
        del folder
        return True

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section: nothing."""
        del where
        return []


@config
class ApptainerContainer:
    """Every task of the step runs `apptainer exec`."""

    kind: Literal["apptainer"] = "apptainer"
    """Tag of this variant."""
    image: str
    """Image file (.sif) or address as apptainer takes it."""
    binds: tuple[str, ...] = ()
    """Folders to show inside, each `SOURCE[:TARGET[:OPTIONS]]`."""
    options: tuple[str, ...] = ()
    """Further options of `apptainer exec`, one argument each (`--nv`)."""
    python: str = "python3"
    """The interpreter inside the image."""

    def step_options(self, folder: str) -> tuple[str, ...]:
        """Return further options of srun for a step that works in `folder`: none."""
        del folder  # `inside` names it
        return ()

    def inside(self, argv: tuple[str, ...], folder: str | None = None) -> tuple[str, ...]:
        """Return the command that runs `argv` inside.

        Args:
            argv: the command.
            folder: where it works, seen from inside; None for the present one.
        """
        binds = (f"--bind={bind}" for bind in self.binds)
        place = () if folder is None else (f"--pwd={folder}",)
        return ("apptainer", "exec", *binds, *place, *self.options, self.image, *argv)

    def shows(self, folder: Path) -> bool:
        """Whether a folder of the node can be seen inside: apptainer adds some of its own."""
        del folder
        return True

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section, one line each.

        Args:
            where: dotted key of this section.
        """
        return collect_problems(
            *_image_checks(self, where),
            lambda: self._bind_problems(f"{where}.binds"),
            lambda: self._option_problems(f"{where}.options"),
        )

    def _bind_problems(self, where: str) -> list[str]:
        found = [
            f"{where}[{index}]: is empty"
            for index, bind in enumerate(self.binds)
            if not bind.strip()
        ]
        return found + _list_path_problems(self.binds, where)

    def _option_problems(self, where: str) -> list[str]:
        return [
            f"{where}[{index}]: {option!r} is no option of apptainer; it must begin with -"
            for index, option in enumerate(self.options)
            if not option.startswith("-")
        ]


@config
class PyxisContainer:
    """srun itself starts the container (NVIDIA's pyxis plug-in and enroot)."""

    kind: Literal["pyxis"] = "pyxis"
    """Tag of this variant."""
    image: str
    """Image as `--container-image` takes it."""
    mounts: tuple[str, ...] = ()
    """Folders to show inside, each `SOURCE[:TARGET[:FLAGS]]`."""
    python: str = "python3"
    """The interpreter inside the image."""

    def step_options(self, folder: str) -> tuple[str, ...]:
        """Return further options of srun for a step that works in `folder`."""
        mounts = (f"--container-mounts={','.join(self.mounts)}",) if self.mounts else ()
        # Without it a step works in the folder that the image names: what it writes under a
        # relative path would go into the container, and away with it.
        return (f"--container-image={self.image}", *mounts, f"--container-workdir={folder}")

    def inside(self, argv: tuple[str, ...], folder: str | None = None) -> tuple[str, ...]:
        """Return the command that runs `argv` inside: itself."""
        del folder
        return argv

    def shows(self, folder: Path) -> bool:
        """Whether a folder of the node can be seen inside under its own name.

        Args:
            folder: an absolute path.
        """
        # SOURCE, SOURCE:TARGET or SOURCE:TARGET:FLAGS.
        targets = (mount.split(":")[:2][-1] for mount in self.mounts)
        return any(folder.is_relative_to(target) for target in targets)

    def problems(self, where: str) -> list[str]:
        """Return everything wrong with the section, one line each.

        Args:
            where: dotted key of this section.
        """
        return collect_problems(
            *_image_checks(self, where),
            lambda: self._mount_problems(f"{where}.mounts"),
        )

    def _mount_problems(self, where: str) -> list[str]:
        found = [
            f"{where}[{index}]: {mount!r} must be SOURCE[:TARGET[:FLAGS]] without a comma"
            for index, mount in enumerate(self.mounts)
            if not mount.strip() or "," in mount
        ]
        return found + _list_path_problems(self.mounts, where)


ContainerConfig = Annotated[
    NoContainer | ApptainerContainer | PyxisContainer, Field(discriminator="kind")
]


def _image_checks(container: ApptainerContainer | PyxisContainer, where: str) -> tuple[Check, ...]:
    """Return the checks of what all containers have, for `collect_problems`."""

    def image() -> list[str]:
        given = container.image
        no_image = not given.strip() or given.startswith("-")
        found = [f"{where}.image: {given!r} names no image"] if no_image else []
        return found + path_problems({f"{where}.image": given})

    def python() -> list[str]:
        if not container.python.strip():
            return [f"{where}.python: is empty; name the interpreter inside the image"]
        return path_problems({f"{where}.python": container.python})

    return image, python


def _list_path_problems(paths: Sequence[str], where: str) -> list[str]:
    return path_problems({f"{where}[{index}]": path for index, path in enumerate(paths)})
