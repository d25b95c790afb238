"""What can be found about a record folder: one table of rules, each with its severity and what to do."""

from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"

RULES = {
    "files.missing": (ERROR, "put the file into the folder"),
    "json.unreadable": (ERROR, "write submission.json as one JSON table"),
    "json.fields": (ERROR, "add the field to submission.json"),
    "json.mean": (ERROR, "let submission.json give the mean over all its seeds"),
    "log.missing": (ERROR, "add the log of each seed as train_seed<N>.log, as the script wrote it"),
    "log.score": (ERROR, "the run did not end with a score: run it again, report no older figure"),
    "log.seeds": (ERROR, "give one log for each seed that submission.json lists, and list every seed that has a log"),
    "log.json": (ERROR, "take the figures of submission.json from the logs"),
    "log.readme": (ERROR, "take the figures of README.md from the logs"),
    "score.adapted": (NOTE, "read how it learns; epigram score MODEL --adapt KIND --probe tests ours on real text"),
    "score.unadapted": (WARNING, "let the log give the score without adaptation beside it, as final_quantized_sliding"),
    "size.cap": (ERROR, "pack the code, widen the quantizer's steps or shrink the model, and run that seed again"),
    "size.counted": (ERROR, "count the bytes of the files as they lie in the folder"),
    "size.artifact": (ERROR, "put the artifact into the folder that the log speaks of"),
    "size.unknown": (WARNING, "let the log say how many bytes the artifact takes, or add the artifact"),
    "time.train": (ERROR, "stop earlier: training, calibration and quantization together must fit"),
    "time.score": (ERROR, "score with a larger stride, or in one streaming pass"),
    "time.unknown": (WARNING, "let the log say how long it took"),
    "calibration.source": (ERROR, "calibrate on training text inside the training time, or on the model's own text"),
    "calibration.unknown": (WARNING, "let the log say what the quantizer was calibrated on"),
    "code.syntax": (ERROR, "train_gpt.py must be a Python script"),
    "code.requirements": (ERROR, "declare the library in requirements.txt"),
    "code.network": (WARNING, "scoring must work without a network: see whether this import can be reached then"),
    "code.pickle": (WARNING, "load the artifact without pickle: torch.load can run what a file says"),
    "code.package": (NOTE, "read the differences: probes ran with the installed package, not with the script's"),
    "run.import": (ERROR, "the script must start in an empty folder with the declared libraries"),
    "run.train": (ERROR, "the script must train, pack and score in an empty folder"),
    "run.network": (ERROR, "take out what opens a connection"),
    "run.untested": (NOTE, "run it yourself, or check again with --execute where you trust the script"),
    "condition.prefix": (ERROR, "a prediction may depend on the artifact and the tokens before it only"),
    "condition.normalised": (ERROR, "the probabilities of all tokens at a place must sum to one"),
    "condition.once": (ERROR, "score every token of the split exactly once"),
    "condition.isolated": (ERROR, "let nothing cross the start of a document, or do not promise it (model.documents)"),
    "condition.released": (ERROR, "a score may depend on what was learned from scored tokens, and on no others"),
    "condition.untested": (NOTE, "put the artifacts into the folder (epigram submit does) to have them probed"),
    "significance.seeds": (WARNING, "three seeds or more are expected of a record"),
    "significance.record": (ERROR, "more seeds, or a better mean, are needed to claim this record"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found. rule: a key of RULES. message: what, where, and the numbers."""

    rule: str
    message: str

    @property
    def severity(self) -> str:
        return RULES[self.rule][0]

    @property
    def action(self) -> str:
        """What to do about it."""
        return RULES[self.rule][1]
