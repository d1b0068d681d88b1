"""Text of radiology reports: sections of plain text, and the XML reports of a package."""

import re
import tarfile
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

from sparseattn.data.problems import DataError, Problems
from sparseattn.data.samples import package_file

_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /()-]{3,}):", re.MULTILINE)
SECTIONS = ("FINDINGS", "IMPRESSION")


def sections(text: str) -> dict[str, str]:
    """Split a report at its headings ("FINDINGS:" at the start of a line); whitespace is folded.

    What stands in front of the first heading has the name "".
    """
    parts = _HEADING.split(text)
    named = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    return {name.strip(): " ".join(words.split()) for name, words in named.items() if words.split()}


def xml_reports(archive: Path, problems: Problems) -> list[dict[str, str]]:
    """Read the Open-i reports of Indiana University out of a .tgz: findings and impression.

    A report without text in either is a problem, and so is one that is not XML.

    Raises:
        DataError: the archive is missing or is no whole tar file.
    """
    if not archive.is_file():
        raise DataError(f"{archive}: missing file: there is no such file")
    reports = []
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.name.endswith(".xml") else None
                if stream is None:
                    continue
                report = _xml_report(stream.read(), f"{archive}:{member.name}", problems)
                if report is not None:
                    reports.append(report)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{archive}: truncated file: {error}") from error
    return reports


def sample_reports(problems: Problems | None = None) -> list[dict[str, str]]:
    """Return the reports that torchxrayvision brings: 3,927 of 3,955 have text.

    They are licensed CC BY-NC-ND 4.0 and read where they are installed, without copying.
    """
    path = package_file("torchxrayvision", "data/NLMCXR_reports.tgz")
    return xml_reports(path, Problems("skip") if problems is None else problems)


def _xml_report(content: bytes, place: str, problems: Problems) -> dict[str, str] | None:
    try:
        tree = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        problems.add(place, "malformed file", f"it is not XML: {error}")
        return None
    texts = {
        node.get("Label"): " ".join((node.text or "").split()) for node in tree.iter("AbstractText")
    }
    found = {name: texts[name] for name in SECTIONS if texts.get(name)}
    if not found:
        problems.add(place, "missing text", f"it has neither {' nor '.join(SECTIONS)}")
        return None
    return found
