"""Small files in the formats of the GLUE downloads."""

from __future__ import annotations

from pathlib import Path

LINES: dict[str, list[str]] = {
    "cola": [
        "gj04\t1\t\tOur friends won't buy this analysis.",
        'gj04\t0\t*\t"They" drank the pub.',
    ],
    "sst2": [
        "sentence\tlabel",
        "hide new secretions from the parental units \t0",
        'a "gem" of a film \t1',
    ],
    "mrpc": [
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tHe called "the witness .\tHe called the witness " .',
        "0\t2108705\t2108831\tYucaipa owned it .\tYucaipa sold it .",
    ],
    "stsb": [
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t1\tnone\tnone\tA plane is taking off.\tAn air plane is.\t5.000",
        "1\tmain\tMSRvid\t2012\t4\tnone\tnone\tA man plays.\tA man plays a flute.\t3.8",
    ],
    "qqp": [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow is life?\tWhat is life?\t0",
        "402555\t536040\t536041\tWhy \u0085 so?\tWhy so?\t1",
    ],
    "mnli": [
        "index\tpromptID\tpairID\tgenre\ts1_bp\ts2_bp\ts1_p\ts2_p\tsentence1\tsentence2\tlabel1"
        "\tgold_label",
        "0\t1\t1n\tgov\t(a)\t(b)\t(ROOT)\t(ROOT)\tIt skims.\tIt has two.\tneutral\tneutral",
        "1\t2\t2e\ttel\t(a)\t(b)\t(ROOT)\t(ROOT)\tyou know\tYou do.\tentailment\tentailment",
        "2\t3\t3c\ttel\t(a)\t(b)\t(ROOT)\t(ROOT)\tyes\tno\tcontradiction\tcontradiction",
    ],
    "qnli": [
        "index\tquestion\tsentence\tlabel",
        "0\tWhen did it end?\tIt ended in 1871.\tentailment",
        "1\tWho was he?\tIt ended in 1871.\tnot_entailment",
    ],
    "rte": [
        "index\tsentence1\tsentence2\tlabel",
        "0\tNo weapons found.\tWeapons found.\tnot_entailment",
        "1\tA place of sorrow.\tA place.\tentailment",
    ],
    "wnli": [
        "index\tsentence1\tsentence2\tlabel",
        "0\tI stuck a pin.\tThe pin had a hole.\t1",
        "1\tI could not.\tI could.\t0",
    ],
}

EXPECTED: dict[str, tuple[list[str], list[str] | None, list[float]]] = {
    "cola": (
        ["Our friends won't buy this analysis.", '"They" drank the pub.'],
        None,
        [1, 0],
    ),
    "sst2": (
        ["hide new secretions from the parental units ", 'a "gem" of a film '],
        None,
        [0, 1],
    ),
    "mrpc": (
        ['He called "the witness .', "Yucaipa owned it ."],
        ['He called the witness " .', "Yucaipa sold it ."],
        [1, 0],
    ),
    "stsb": (
        ["A plane is taking off.", "A man plays."],
        ["An air plane is.", "A man plays a flute."],
        [5.0, 3.8],
    ),
    "qqp": (["How is life?", "Why \u0085 so?"], ["What is life?", "Why so?"], [0, 1]),
    "mnli": (["It skims.", "you know", "yes"], ["It has two.", "You do.", "no"], [1, 0, 2]),
    "qnli": (
        ["When did it end?", "Who was he?"],
        ["It ended in 1871.", "It ended in 1871."],
        [0, 1],
    ),
    "rte": (["No weapons found.", "A place of sorrow."], ["Weapons found.", "A place."], [1, 0]),
    "wnli": (["I stuck a pin.", "I could not."], ["The pin had a hole.", "I could."], [1, 0]),
}
"""First texts, second texts and labels that the lines above hold."""


def write_lines(path: Path, lines: list[str], *, newline: str = "\n") -> Path:
    """Write lines, the last one with its end too."""
    path.write_bytes("".join(line + newline for line in lines).encode())
    return path
