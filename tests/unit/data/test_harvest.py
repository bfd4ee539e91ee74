from __future__ import annotations

import sys
import textwrap

import pytest

from mpotrain.data.harvest import MIN_DOCUMENT_BYTES, digest, find_files, harvest
from mpotrain.errors import DataError

LONG = "This sentence is here to make the document long enough to be kept by the harvest. " * 3


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that must never be imported."""
    root = tmp_path / "prosepack"
    (root / "tests").mkdir(parents=True)
    (root / "sub").mkdir()
    files = {
        "__init__.py": f'"""Top of the package.\n\n{LONG}\n"""\nraise RuntimeError("imported!")\n',
        "beta.py": f'''
            """Module beta. {LONG}"""

            class Thing:
                """A thing of beta."""

                def act(self):
                    """Acts,

                        with an indented line
                    and one that is not.
                    """

            if True:
                async def later():
                    """Found below a condition."""

            def silent():
                pass

            add_docstr(beta.fast, r"""Written in C. Its text stands in a call.""")
            add_newdoc("prosepack.beta", "Array", ("shape", """Tuple of array dimensions."""))
            ''',
        "alpha.py": f'"""Module beta. {LONG}"""\ndef f():\n    """Alpha alone. {LONG}"""\n',
        "short.py": '"""Too short."""\n',
        "broken.py": "def (:\n",
        "latin.py": b'# coding: latin-1\n"""caf\xe9 ' + LONG.encode() + b'"""\n',
        "invalid.py": b'"""\xff\xfe ' + LONG.encode() + b'"""\n',
        "lone.py": f'"""\\ud800 lone surrogate. {LONG}"""\n',
        "tests/test_x.py": f'"""A test. {LONG}"""\n',
        "sub/__init__.py": f'"""Sub package. {LONG}"""\n',
    }
    for name, text in files.items():
        content = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        (root / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    return root


def test_documents_are_whole_modules_in_a_fixed_order(package):
    documents = list(harvest(["prosepack"]))
    titles = [document.split("\n")[0] for document in documents]
    assert titles == [
        "prosepack",
        "prosepack.alpha",
        "prosepack.beta.Thing",  # its module docstring is the one of alpha
        "prosepack.latin",
        "prosepack.lone",
        "prosepack.sub",
    ]
    assert list(harvest(["prosepack"])) == documents
    assert "prosepack" not in sys.modules
    assert not any("A test." in document or "Too short" in document for document in documents)


def test_content_of_one_module(package):
    (package / "alpha.py").unlink()
    document = next(d for d in harvest(["prosepack"]) if d.startswith("prosepack.beta\n"))
    assert document == (
        f"prosepack.beta\n\nModule beta. {LONG.rstrip()}\n\n\n"
        "prosepack.beta.Thing\n\nA thing of beta.\n\n\n"
        "prosepack.beta.Thing.act\n\nActs,\n\n    with an indented line\nand one that is not.\n\n\n"
        "prosepack.beta.later\n\nFound below a condition.\n\n\n"
        "beta.fast\n\nWritten in C. Its text stands in a call.\n\n\n"
        "prosepack.beta.Array.shape\n\nTuple of array dimensions.\n"
    )


def test_a_docstring_that_occurred_before_is_left_out(package):
    documents = list(harvest(["prosepack"]))
    assert sum(f"Module beta. {LONG.rstrip()}" in document for document in documents) == 1
    assert any("Alpha alone." in document for document in documents)


def test_encodings_and_surrogates(package):
    documents = {d.split("\n")[0]: d for d in harvest(["prosepack"])}
    assert "café" in documents["prosepack.latin"]
    assert "? lone surrogate" in documents["prosepack.lone"]
    assert "prosepack.invalid" not in documents
    for document in documents.values():
        assert len(document.encode()) >= MIN_DOCUMENT_BYTES


def test_limit_takes_whole_documents_and_is_a_prefix(package):
    documents = list(harvest(["prosepack"]))
    sizes = [len(document.encode()) for document in documents]
    limit = sizes[0] + sizes[1] + sizes[2] - 1
    assert list(harvest(["prosepack"], max_bytes=limit)) == documents[:2]
    assert list(harvest(["prosepack"], max_bytes=limit + 1)) == documents[:3]


def test_digest_follows_content_and_names(package):
    before = digest(["prosepack"])
    assert digest(["prosepack"]) == before
    path = package / "beta.py"
    path.write_text(path.read_text().replace("A thing", "A thong"))
    changed = digest(["prosepack"])
    assert changed != before
    path.rename(package / "betb.py")
    assert digest(["prosepack"]) not in (before, changed)


def test_packages_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    for bad in ("no_such_package_here", "sys", "os.path", "../etc"):
        with pytest.raises(DataError, match=f"installed:{bad}"):
            list(harvest([bad]))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "data.txt").write_text("no source")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="installed:hollow"):
        digest(["hollow"])


def test_single_file_module_and_repeated_names():
    files = find_files(["textwrap", "textwrap"])
    assert [file.name for file in files] == ["textwrap"]
    (document,) = harvest(["textwrap"])
    assert "Text wrapping and filling." in document
    assert "textwrap.dedent\n\nRemove any common leading whitespace" in document


def test_help_topics_are_documents_of_their_own():
    documents = list(harvest(["pydoc_data"]))
    assert len(documents) > 50
    assert any(document.startswith('The "assert" statement') for document in documents)


def test_standard_library_is_real_prose():
    documents = list(harvest(["stdlib"], max_bytes=300_000))
    text = "".join(documents)
    assert 250_000 < len(text.encode()) <= 300_000
    assert len(set(documents)) == len(documents)
    words = text.split()
    assert words.count("the") / len(words) > 0.03
    names = {file.name for file in find_files(["stdlib"])}
    assert {"json.decoder", "pydoc_data.topics", "argparse"} <= names
    assert not any(name.startswith(("test.", "site-packages")) for name in names)
