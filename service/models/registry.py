"""The models that are served: found in the repository, loaded, and replaced while serving.

A version takes traffic only once it is verified and warmed up (`service.models.loading`). A broken version leaves the
old one serving, and the index gives the reason. An unloaded model first answers what it has accepted. While a
repository or a folder cannot be listed, what serves goes on serving.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import structlog

from service.bundle import Listing, list_repository, signature, versions
from service.errors import BundleError, NotReady, RepositoryError, ServiceError, StartupError, UnknownModel
from service.models.failures import Failures
from service.models.family import Family, families_of
from service.models.index import Entry, Index
from service.models.loading import Loader
from service.models.model import Model
from service.models.source import Source
from service.scheduling.scheduler import Scheduler

log = structlog.get_logger()


@dataclass(slots=True, kw_only=True)
class _Scan:
    """The outcome of scanning the repository for one model."""

    published: list[int]
    loaded: list[Model] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    """Versions to serve: those just loaded, and those that stay."""
    failures: list[str] = field(default_factory=list)


class Registry:
    """Ready models by name and version, their families, and the reasons why others could not be loaded.

    `load_all` blocks and is for the start; `load`, `unload` and `refresh` run on the event loop, while serving.
    """

    def __init__(
        self,
        loader: Loader,
        scheduler: Scheduler,
        *,
        repository: Path,
        names: Sequence[str],
        default_model: str | None,
        alias: str | None,
        versions_to_serve: int,
        step_up_headroom: float,
        source: Source | None = None,
        on_trial: Collection[tuple[str, int]] = (),
    ) -> None:
        """`names`: the models to serve, empty for all in the repository. `source`: what `repository` is a copy of.
        `on_trial`: further versions to serve, which answer only requests for that version number as long as another
        version serves. The rest as in `service.settings`."""
        self._loader, self._scheduler, self._source = loader, scheduler, source
        self._missing: Mapping[tuple[str, int], str] = {}
        """Why versions of the source are not in the repository's folder."""
        self._repository, self._names = repository, tuple(names)
        self._default_model, self._alias = default_model, alias
        self.versions_to_serve, self._step_up_headroom = versions_to_serve, step_up_headroom
        self.loads: Counter[Literal["ready", "failed"]] = Counter()
        """Versions that were loaded, and that could not be loaded, since the start."""
        self.readable = True
        """Whether the repository could be listed when it was last scanned, and all folders in it."""
        self._on_trial = frozenset(on_trial)
        self._apart: set[tuple[str, str]] = set()
        """Pairs of a family and a model that takes no part in it."""
        self._models: dict[str, dict[int, Model]] = {}
        self._index = Index()
        self._unloaded: set[str] = set()
        """Unloaded by request: polling does not load them again."""
        self._withdrawn: set[tuple[str, int]] = set()
        """Versions that kept failing: polling does not load them again either."""
        self._failures = Failures(loader.memory_left)
        self._exchange: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By name: a model that takes long to load does not keep others from being unloaded."""
        self._loading = asyncio.Lock()
        """Taken before the lock of a name: loads wait here, and not in threads, which other work needs."""
        self._closed = False
        self._choosers: dict[str, Family] = {}
        self._families: dict[str, list[Model]] | None = None
        """Cached until the models change."""

    @property
    def ready(self) -> list[Model]:
        """Every model that takes traffic, by name and version."""
        return [self._models[name][version] for name in sorted(self._models) for version in sorted(self._models[name])]

    @property
    def index(self) -> list[Entry]:
        """Every version that is or could be served, and its state."""
        return self._index.entries_during(self._scheduler.hang)

    @property
    def default(self) -> str | None:
        """The model for a request that names none: the configured one, else the most accurate one."""
        if self._default_model is not None:
            return self._default_model
        newest = [self._newest(name) for name in sorted(self._models)]
        if self._apart:
            apart = {name for _, name in self._apart}
            newest = [model for model in newest if model.name not in apart] or newest
        return max(newest, key=lambda model: model.top1).name if newest else None

    def find(self, name: str | None, version: int | None = None) -> Model:
        """A model by its name, or the default one for None or its alias; the newest version unless one is named.

        Raises UnknownModel, whose message lists the known ones, or NotReady while the model is being loaded.
        """
        aliased = name == self._alias and name not in self._index.names
        wanted = self.default if aliased else name or self.default
        if wanted is None:
            raise NotReady("no model is loaded: load one, then retry")
        ready = self._models.get(wanted, {})
        if version is None and ready:
            return self._newest(wanted)
        if version in ready:
            return ready[version]
        known = [entry for entry in self.index if entry.name == wanted and version in (None, entry.version)]
        if any(entry.state == "loading" for entry in known):
            raise NotReady(f"model {wanted!r} is being loaded: retry")
        if known:
            raise UnknownModel(f"model {wanted!r} is {known[-1].state}: {known[-1].reason or 'retry later'}")
        if ready:
            raise UnknownModel(f"model {wanted!r} has no version {version} here; there are: {_listed(ready)}")
        names, families = _listed(self._models) or "none", _listed(self.families) or "none"
        raise UnknownModel(f"no model {wanted!r} here; there are: {names}; families: {families}")

    @property
    def families(self) -> dict[str, list[Model]]:
        """See `families_of`."""
        if self._families is None:
            self._families = families_of(map(self._newest, sorted(self._models)))
            for family, name in self._apart:
                members = self._families.get(family, [])
                self._families[family] = [model for model in members if model.name != name] or members
                if not members:
                    del self._families[family]
        return self._families

    def is_family(self, name: str) -> bool:
        """Whether a name stands for a family: a model takes precedence over a family of the same name."""
        return name not in self._models and name in self.families

    def keep_apart(self, family: str, name: str) -> None:
        """Leave a model out of its family's choice, and of the default, as long as there are others."""
        self._apart.add((family, name))
        self._families = None

    def get(self, name: str, version: int | None = None) -> Model | None:
        """A model that takes traffic, or None; unlike `find`, without the reason."""
        ready = self._models.get(name)
        if not ready:
            return None
        return self._newest(name) if version is None else ready.get(version)

    def candidates(self, name: str | None, version: int | None = None) -> tuple[Family | None, list[Model]]:
        """The models that may answer a request for `name`, the most accurate first, and their family if it names one.

        Raises what `find` raises.
        """
        if name is None or version is not None or not self.is_family(name):
            return None, [self.find(name, version)]
        chooser = self._choosers.setdefault(name, Family(name, step_up_headroom=self._step_up_headroom))
        return chooser, self.families[name]

    def serving(self, name: str, version: int | None = None) -> list[Model]:
        """The models that a name stands for: all versions that serve, or the members of a family.

        Raises what `find` raises.
        """
        if version is None and name in self._models:
            return [self._models[name][number] for number in sorted(self._models[name])]
        return self.candidates(name, version)[1]

    def load_all(self) -> None:
        """Load all models to serve. Blocks; call the loader's `rest` afterwards.

        A broken bundle is logged and left out. Raises StartupError if its model is named in the settings, or if no
        model is left.
        """
        try:
            self._fetch_or_go_on()
            listing = list_repository(self._repository)
        except BundleError as error:
            raise StartupError(str(error)) from error
        for name in self._names or self._known(listing):
            scan = self._scan(name, fresh=True)
            self._serve(scan)
            if not scan.wanted and name in self._names:
                raise StartupError(f"model {name!r}: {scan.failures[-1]}")
        if not self._models:
            raise StartupError(f"no model can be served from {self._repository}: see the log above")
        if self._default_model is not None and self._default_model not in self._models:
            ready = _listed(self._models)
            raise StartupError(f"default_model {self._default_model!r} is not among the ready models: {ready}")

    async def load(self, name: str) -> None:
        """Load the newest versions of a model again, and replace those that serve.

        Raises UnknownModel if the repository has none or the settings exclude it, BundleError if a version cannot be
        loaded, and NotReady while the service shuts down; then what served before goes on serving.
        """
        await asyncio.to_thread(self._require_known, name)
        async with self._loading:
            self._unloaded.discard(name)
            try:
                scan = await self._update(name, fresh=True)
            finally:
                await asyncio.to_thread(self._loader.rest)
        if self._closed:
            raise NotReady("the service is shutting down")
        if scan.failures:
            raise BundleError(f"model {name!r}: {'; '.join(scan.failures)}")

    async def restore(self, name: str, versions: Collection[int], *, withdraw: bool = False) -> None:
        """Serve these versions of a model and no others, as before a change that failed in another process.

        `withdraw`: polling does not load the others again, until a request does. Raises BundleError if a version
        cannot be loaded or is gone; then what served before goes on serving.
        """
        if not versions:
            if name in self._models:
                await self.unload(name)
            return
        async with self._loading:
            self._unloaded.discard(name)
            try:
                scan = await self._update(name, fresh=False, only=frozenset(versions))
            finally:
                await asyncio.to_thread(self._loader.rest)
        if withdraw:
            self._withdrawn |= {(name, version) for version in scan.published if version not in versions}
        if missing := set(versions) - scan.wanted:
            why = "; ".join(scan.failures) or "not in the repository"
            raise BundleError(f"model {name!r}: version {_listed(missing)}: {why}")

    async def unload(self, name: str) -> None:
        """Take a model out of service once it has answered what it accepted. Raises UnknownModel."""
        if name not in self._models:
            raise UnknownModel(f"model {name!r} is not loaded")
        self._unloaded.add(name)  # at once: a poll may be waiting for the same lock
        async with self._exchange[name]:
            await self._retire(list(self._models.get(name, {}).values()), reason="unloaded", keep=True)

    async def withdraw(self, model: Model, reason: str) -> None:
        """Take a version that keeps failing out of service, until it is loaded by request; its family goes on."""
        async with self._exchange[model.name]:
            if self._models.get(model.name, {}).get(model.version) is model:
                log.error("model taken out of service", model=model.name, version=model.version, reason=reason)
                self._withdrawn.add((model.name, model.version))
                await self._retire([model], reason=reason, keep=True)

    async def refresh(self) -> None:
        """Scan the repository once: load new versions, and retire those that have been removed."""
        try:
            await asyncio.to_thread(self._fetch)
            listing = await asyncio.to_thread(self._list)
        except NotReady:  # the service is shutting down
            return
        except BundleError as error:
            if self.readable:
                log.error("repository cannot be read", reason=str(error))
            self.readable = False
            return
        if not self.readable and not listing.unreadable:
            log.info("repository can be read again")
        self.readable = not listing.unreadable
        async with self._loading:
            try:
                for name in self._names or self._known(listing):
                    if name not in self._unloaded:
                        await self._update(name, fresh=False)
            finally:
                await asyncio.to_thread(self._loader.rest)

    def close(self) -> None:
        """Abort loads in progress, and load nothing more; what serves goes on serving. From any thread."""
        self._closed = True
        if self._source:
            self._source.close()
        self._loader.close()

    def _require_known(self, name: str) -> None:
        if self._names and name not in self._names:
            raise UnknownModel(f"the settings serve only: {', '.join(self._names)}")
        self._fetch_or_go_on(force=True)
        # A name from a request never becomes a path unless the repository lists it.
        if name not in self._known(list_repository(self._repository), listed_only=True):
            raise UnknownModel(f"no model {name!r} in the repository")

    def _known(self, listing: Listing, *, listed_only: bool = False) -> list[str]:
        """Models in the repository, including those without a fetched version, and those known from before."""
        before = () if listed_only else (*list(self._models), *self._index.names)
        return sorted({*listing.names, *(name for name, _ in self._missing), *before})

    def _fetch(self, *, force: bool = False) -> None:
        """Bring the repository's folder up to date, if it is a copy. Blocks. Raises RepositoryError or NotReady."""
        if self._source:
            serving = {(name, version) for name, some in list(self._models.items()) for version in list(some)}
            self._missing = self._source.update(serving, force=force)

    def _fetch_or_go_on(self, *, force: bool = False) -> None:
        """Like `_fetch`; if that fails, go on with what was fetched before, if there is anything."""
        try:
            self._fetch(force=force)
        except RepositoryError as error:
            if not list_repository(self._repository).names:
                raise
            log.warning("repository cannot be read: what was fetched before is loaded", reason=str(error))
            self.readable = False

    def _list(self) -> Listing:
        """List the repository. Raises BundleError also if it is empty while something serves."""
        listing = list_repository(self._repository)
        if self._models and not listing.names:
            # A network mount that is gone leaves an empty folder.
            raise BundleError(f"the model repository {self._repository} is empty: the loaded models keep serving")
        return listing

    async def _update(self, name: str, *, fresh: bool, only: frozenset[int] | None = None) -> _Scan:
        async with self._exchange[name]:
            before = dict(self._models.get(name, {}))
            scan = await asyncio.to_thread(self._scan, name, fresh=fresh, only=only)
            self._serve(scan)
            replaced = {model.version for model in scan.loaded}
            # Nothing is retired for a version that cannot serve, nor because the folder cannot be listed.
            if scan.wanted or not scan.published:
                retired = [m for version, m in before.items() if version in replaced or version not in scan.wanted]
                await self._retire(retired, reason="" if scan.published else "removed from the repository")
            return scan

    def _scan(self, name: str, *, fresh: bool, only: frozenset[int] | None = None) -> _Scan:
        """Load the newest versions that can be loaded, or all of `only`. Blocks.

        Unless `fresh`, versions that serve stay, and those that failed are tried again only once there is a reason to.
        """
        serving = set(self._models.get(name, {}))
        try:
            scan = _Scan(published=versions(self._repository, name))
            if serving and not scan.published:
                self._list()  # a repository that has vanished since then has no versions either
        except (OSError, BundleError) as error:
            why = error.strerror if isinstance(error, OSError) else "nor can the repository"
            reason = f"its folder cannot be listed ({why})"
            self._index.note_unlisted(name, reason)
            return _Scan(published=sorted(serving), wanted=serving, failures=[reason])
        expected = name in self._names
        missing = {version: why for (of, version), why in self._missing.items() if of == name}
        for version in self._index.note_listed(name, [*scan.published, *missing], expected=expected):
            self._failures.forget((name, version))
        self._note_missing(scan, name, missing)
        if not scan.published and not serving and not missing:
            scan.failures.append("no version of it in the repository")
            if expected:
                self._index.note_unlisted(name, scan.failures[0])
        for version in reversed(scan.published):
            on_trial = (name, version) in self._on_trial
            if only is not None and version not in only:
                continue
            full = sum((name, each) not in self._on_trial for each in scan.wanted) == self.versions_to_serve
            if only is None and full and not on_trial:
                continue
            if fresh or only is not None:
                self._withdrawn.discard((name, version))
            elif (name, version) in self._withdrawn:
                continue
            folder = self._repository / name / str(version)
            if not fresh and version in serving:
                scan.wanted.add(version)
            elif fresh or only is not None or self._failures.worth_trying((name, version), folder):
                self._try(scan, name, version, folder, serving=version in serving)
        return scan

    def _note_missing(self, scan: _Scan, name: str, missing: Mapping[int, str]) -> None:
        """Note in the index why versions could not be fetched; a load fails if one is newer than all that are here."""
        for version in sorted(set(missing) - set(scan.published)):
            self._index.note(name, version, "unavailable", missing[version])
            if version > max(scan.published, default=0):
                scan.failures.append(missing[version])

    def _try(self, scan: _Scan, name: str, version: int, folder: Path, *, serving: bool) -> None:
        if not serving:
            self._index.note(name, version, "loading")
        seen = signature(folder)
        try:
            scan.loaded.append(self._loader.load(folder))
            scan.wanted.add(version)
            self._failures.forget((name, version))
            self.loads["ready"] += 1
        except Exception as error:  # a bundle that cannot be loaded never keeps others from being served
            if not (isinstance(error, ServiceError) or self._closed):
                log.exception("loading failed", model=name, version=version)
            # Clients see the reason, so it leaves out the path of the repository.
            reason = str(error).replace(f"{self._repository}/", "")
            scan.failures.append(reason)
            self.loads["failed"] += 1
            if self._failures.record((name, version), seen, error):
                log.error("model unavailable", model=name, version=version, reason=str(error))
            if serving:
                scan.wanted.add(version)
                self._index.note(name, version, "ready", f"not reloaded: {reason}")
            else:
                self._index.note(name, version, "unavailable", reason)

    def _serve(self, scan: _Scan) -> None:
        for model in scan.loaded:
            self._scheduler.add(model.queue)
            self._models.setdefault(model.name, {})[model.version] = model
            self._index.note(model.name, model.version, "ready")
        self._families = None

    async def _retire(self, models: list[Model], *, reason: str = "", keep: bool = False) -> None:
        """Let models answer what they accepted, then free their memory. `keep`: the index keeps the reason."""
        for model in models:
            serving = self._models.get(model.name, {})
            if serving.get(model.version) is model:
                del serving[model.version]
                if not serving:
                    del self._models[model.name]
                self._index.note(model.name, model.version, "unloading", reason)
        self._families = None
        for model in models:
            await model.retire(self._scheduler)
            # Unless the version was loaded again in the meantime.
            if self._index.state(model.name, model.version) == "unloading":
                if keep:
                    self._index.note(model.name, model.version, "unavailable", reason)
                else:
                    self._index.remove(model.name, model.version)

    def _newest(self, name: str) -> Model:
        ready = self._models[name]
        if self._on_trial:
            return ready[max(ready, key=lambda version: ((name, version) not in self._on_trial, version))]
        return ready[max(ready)]


def _listed(names: Iterable[str] | Iterable[int]) -> str:
    return ", ".join(map(str, sorted(names)))
