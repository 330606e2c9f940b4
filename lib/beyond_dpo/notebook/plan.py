"""Plan a run: which notebooks are meant, with which parameters, and what each would compute.

papermill alone lets a misspelt parameter pass with exit 0. Here it is refused, as are wrong types
and parameters that papermill cannot see. A refusal comes before anything is loaded or computed.
"""

import ast
import contextlib
import difflib
import functools
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beyond_dpo.machine import paths
from beyond_dpo.pipeline import artifacts, config, needs

# Recomputed from published tables, replayed or exact: seconds each, without any model.
QUICK = ("18", "19", "20", "21", "22", "23")


class Refused(ValueError):
    """Say why nothing is run."""


@dataclass(frozen=True)
class Plan:
    """One notebook of a run.

    notebook: its content (nbformat). changes: the parameters that the run sets. parameters: all of
    them, as the notebook will have them.
    """

    path: Path
    notebook: object
    changes: dict
    parameters: dict

    @property
    def name(self) -> str:
        """Return the stem of its file name."""
        return self.path.stem

    @functools.cached_property
    def results(self) -> list[artifacts.Artifact]:
        """Return the artifacts that it will ask for, as far as it names them beforehand.

        None for a notebook without a configuration: it computes nothing of the pipeline, or is one
        of the user's own, whose cells run once, in the kernel. Raises what its first cells raise.
        """
        if configuration(self.notebook, self.parameters) is None:
            return []
        return planned(self.notebook, self.parameters, asks_hub=True)[1]

    @property
    def profile(self) -> str | None:
        """Return the profile that it runs with; None for a notebook without one."""
        return self.parameters.get("profile")


def find(names: list[str]) -> list[Path]:
    """Return the notebooks meant by number prefix, stem or path; without names all.

    Of all, the quick ones come first and the scoreboard of all last.
    Raises Refused for a name that fits none or several.
    """
    known = sorted(paths.NOTEBOOKS.glob("*.ipynb"), key=_turn)
    if not known and not names:
        raise Refused(f"no notebook in {paths.NOTEBOOKS}")
    if not names:
        return known
    return [_named(name, known) for name in names]


def _named(name: str, known: list[Path]) -> Path:
    """Return the one notebook that a name of the command line means."""
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    fitting = [path for path in known if name == path.stem or path.name.startswith(f"{name}_")]
    if len(fitting) == 1:
        return fitting[0]
    nearest = difflib.get_close_matches(name, [path.stem for path in known], n=3, cutoff=0)
    raise Refused(
        f"{name}: fits {len(fitting)} notebooks of {paths.NOTEBOOKS}; nearest: {', '.join(nearest)}"
    )


def _turn(path: Path) -> tuple[int, str]:
    """Return the place of a notebook among all of them, to sort by."""
    number = path.name[:2]
    if number in QUICK:
        return 0, path.name
    if number == "00":
        return 2, path.name
    return 1, path.name


def parameters(notebook, name: str) -> dict:
    """Return the parameters that a notebook declares, from the cell tagged `parameters`.

    The values are their defaults. Raises Refused for a cell that holds anything but
    `name = literal`, once each, or a line that papermill cannot see.
    """
    declared: dict = {}
    for cell in notebook.cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError as error:
            where = f"parameters cell, line {error.lineno}"
            raise Refused(f"{name}: {where}: {error.msg}") from None
        for statement in statements:
            parameter, value = _literal(statement, name)
            if parameter in declared:
                raise _unfit(statement, name)
            declared[parameter] = value
        _check_seen(cell, declared, name)
    return declared


def _literal(statement: ast.stmt, name: str) -> tuple:
    """Return (parameter, value) of a statement `parameter = literal`; raise Refused for others.

    A derived value would go stale when a parameter is set, and papermill passes tuples and sets on
    as text: only what JSON gives back unchanged is taken.
    """
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    try:
        value = ast.literal_eval(statement.value)
        if len(targets) == 1 and json.loads(json.dumps(value)) == value:
            return targets[0].id, value
    except (ValueError, TypeError, AttributeError):
        pass
    raise _unfit(statement, name)


def _unfit(statement: ast.stmt, name: str) -> Refused:
    return Refused(
        f"{name}: parameters cell, line {statement.lineno}: `{ast.unparse(statement)}` is not "
        "`name = value` with None or a bool, int, float, str, list or dict, each name once"
    )


def _check_seen(cell, declared: dict, name: str) -> None:
    """Raise Refused for a parameter that papermill's own reading of the cell misses."""
    from papermill.translators import PythonTranslator

    logging.getLogger("papermill").setLevel(logging.ERROR)
    seen = {parameter.name for parameter in PythonTranslator.inspect(cell)}
    hidden = sorted(set(declared) - seen)
    if hidden:
        raise Refused(
            f"{name}: papermill cannot see {', '.join(hidden)}; write `name = value` without an "
            "annotation and with one '=' in the line, its comment included"
        )


def check(name: str, declared: dict, texts: dict[str, str]) -> dict:
    """Return the texts of a command line as values of the declared types.

    A text is read as a Python literal, else taken as it is; an int may stand for a float.
    Raises Refused for an unknown name, with the nearest one, and for a wrong type.
    """
    return {key: _value(name, declared, key, text) for key, text in texts.items()}


def _value(name: str, declared: dict, key: str, text: str):
    if key not in declared:
        raise Refused(f"{name}: no parameter '{key}'; {_nearest(key, declared)}")
    default = declared[key]
    value = text
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
    if isinstance(default, str) and not isinstance(value, str):
        value = text
    if not _fits(default, value):
        kind = type(value).__name__
        raise Refused(f"{name}: {key}={text} is a {kind}, unlike its default {default!r}")
    if isinstance(value, tuple):
        return list(value)
    if type(default) is float:
        return float(value)
    return value


def _nearest(key: str, declared: dict) -> str:
    if not declared:
        return "it declares none"
    nearest = difflib.get_close_matches(key, declared, n=1, cutoff=0)[0]
    return f"did you mean '{nearest}'? It declares {', '.join(declared)}"


def _fits(default, value) -> bool:
    """Say whether a value may stand where the default stands."""
    if default is None:
        return True
    if isinstance(default, list):
        if not isinstance(value, list | tuple):
            return False
        examples = default or [None]
        return all(any(_fits(example, item) for example in examples) for item in value)
    if type(default) is float and type(value) is int:
        return True
    return type(value) is type(default)


def configuration(notebook, values: dict):
    """Return the configuration that a notebook's set-up loads; None where it loads none.

    Only the set-up's assignments up to that are executed, none of its imports, so that this takes
    no time. values: of all parameters. Raises ConfigError as config.load() does, and ValueError for
    a cluster that the environment does not describe well.
    """
    for source in _code(notebook):
        try:
            statements = ast.parse(source).body
        except SyntaxError:  # a magic command, say
            continue
        assignments = [node for node in statements if isinstance(node, ast.Assign)]
        for number, node in enumerate(assignments, 1):
            is_call = isinstance(node.value, ast.Call)
            if is_call and ast.unparse(node.value.func) == "config.load":
                return _assigned(assignments[:number], values)
    return None


def _assigned(assignments: list[ast.Assign], values: dict):
    """Return what the last of these assigns; None where they need more than the parameters."""
    names = {**values, "config": config}
    try:
        exec(compile(ast.Module(assignments, []), "set-up", "exec"), names)
    except ValueError:
        raise
    except Exception:  # the notebook itself will show it
        return None
    return names.get(ast.unparse(assignments[-1].targets[0]))


def _code(notebook) -> list[str]:
    """Return the sources of a notebook's code cells, without its parameters."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c.source for c in cells if "parameters" not in c.metadata.get("tags", [])]


def planned(notebook, values: dict, asks_hub: bool = False) -> tuple:
    """Return a notebook's configuration and the artifacts that it names, as its own cells say.

    Those are the set-up and the cell that names its results; the configuration is None if it loads
    none. values: of all parameters. Nothing is computed. asks_hub: for the commits of models and
    data on the hub; without it no network is asked, and what is made from those has other keys than
    in a run. Raises ValueError where the set-up does (a ConfigError is one).
    """
    names = dict(values)
    mode = "name" if asks_hub else "plan"
    with _compute_mode(mode), contextlib.suppress(artifacts.MissingArtifact):
        # it ends at the first result that it would show
        exec("\n".join(_code(notebook)[:2]), names)
    results = [value for value in names.values() if isinstance(value, artifacts.Artifact)]
    return names.get("cfg"), results


@contextlib.contextmanager
def _compute_mode(mode: str) -> Iterator[None]:
    """Set COMPUTE inside (artifacts.PLANNING); where it was cold, that is added."""
    before = os.environ.get("COMPUTE")
    os.environ["COMPUTE"] = f"{mode} cold" if before == "cold" else mode
    try:
        yield
    finally:
        del os.environ["COMPUTE"]
        if before is not None:
            os.environ["COMPUTE"] = before


def described(notebook, values: dict) -> list[str]:
    """Return what a notebook needs and executes, a line each; arguments as for planned()."""
    try:
        cfg, results = planned(notebook, values)
    except ValueError as reason:  # a ConfigError, or variables that do not describe a cluster well
        return [f"is refused: {reason}"]
    upstream: dict = {}
    for result in results:
        upstream |= result.upstream
    work = [artifact for artifact in upstream.values() if artifact.does]
    if not work:
        return ["computes nothing: shows what others found or printed"]
    # a model of the hub that is not pinned to a commit: no key is known without asking
    unpinned = any('"plan": ' in json.dumps(artifact.recipe) for artifact in upstream.values())
    lines = [_command(artifact, "KEY" if unpinned else artifact.key) for artifact in work]
    demand, world = cfg.needs, cfg.world
    prompts = "given pairs" if world.pairs == "given" else "prompts for pairs"
    return [
        f"needs: {demand.gpus} GPUs of {demand.gpu_gb} GB, {demand.memory_gb} GB memory, "
        f"{demand.disk_gb} GB disk, about {demand.hours:g} h",
        f"models: target {world.target}, reward model {world.reward_model}; data: {world.dataset}, "
        f"{world.prompts} {prompts}, {world.dev_prompts} dev, {world.test_prompts} test",
        *dict.fromkeys(lines),
    ]


def _command(artifact: artifacts.Artifact, key: str) -> str:
    """Return what is done for an artifact, with its command."""
    job = str(paths.ARTIFACTS / f"{key}.partial/checkpoints/config.json")
    return artifact.does.replace("{job}", job)  # names of models and files may hold braces


def plan(options) -> list[Plan]:
    """Check all notebooks of a command line before the first one runs; raise Refused."""
    _check_options(options)
    texts = dict(pair.partition("=")[::2] for pair in options.given)
    if options.profile:
        texts["profile"] = options.profile
    plans = []
    for path in find(options.notebooks):
        notebook = _opened(path)
        declared = parameters(notebook, path.stem)
        own = dict(texts)
        if options.all and "profile" not in declared:  # it only shows what others found
            own.pop("profile", None)
        changes = check(path.stem, declared, own)
        one = Plan(path, notebook, changes, declared | changes)
        _check_profile(one, options)
        if not options.dry_run:  # which says so for each notebook
            check_setup(one, options.force)
        plans.append(one)
    return plans


def _check_options(options) -> None:
    """Refuse a command line that contradicts itself, and a COMPUTE with which nothing could run."""
    if bool(options.notebooks) == options.all:
        raise Refused("name notebooks, or give --all")
    if options.in_place and (options.given or options.profile):
        raise Refused("--in-place runs the values written in the parameters cell; edit them there")
    if options.freeze and options.given:
        raise Refused("--freeze keeps what a profile gives by itself: leave -p away")
    try:
        mode = artifacts.compute_mode()
    except ValueError as error:
        raise Refused(str(error)) from None
    if mode == "plan":
        raise Refused(
            "COMPUTE=plan finds and computes nothing; to see what would run, use --dry-run"
        )


def _opened(path: Path):
    """Return the content of a notebook; raise Refused for a file that is none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, AttributeError) as error:  # the last for JSON that is no notebook
        reason = " ".join(str(error).split())[:200]
        raise Refused(
            f"{path} cannot be read as a notebook ({type(error).__name__}: {reason})"
        ) from None


def _check_profile(one: Plan, options) -> None:
    if one.profile not in (None, *config.PROFILES):  # it names files
        known = ", ".join(config.PROFILES)
        raise Refused(f"{one.name}: profile {one.profile!r} is none of {known}")
    if options.freeze and one.profile == "smoke":
        raise Refused(
            f"{one.name}: --freeze keeps results, and those of profile smoke mean nothing; use cpu"
        )


def check_setup(one: Plan, force: bool = False) -> None:
    """Refuse what a notebook's own set-up would refuse, and a machine that is too small for it.

    On any machine a notebook shows results that are there. force: whatever the machine.
    """
    try:
        cfg = configuration(one.notebook, one.parameters)
    except ValueError as error:
        raise Refused(f"{one.name}: {error}") from None
    if cfg is None or force or os.environ.get("COMPUTE") == "never":
        return
    try:
        needs.check(cfg)
    except config.ConfigError as shortage:
        if _lacks_results(one):
            raise Refused(f"{one.name}: {shortage} (--force runs it all the same)") from None
    except ValueError as error:  # of the variables that describe a cluster
        raise Refused(f"{one.name}: {error}") from None


def _lacks_results(one: Plan) -> bool:
    """Say whether a notebook would compute anything."""
    try:
        return any(result.missing() for result in one.results)
    except Exception:  # what it needs cannot even be named
        return True
