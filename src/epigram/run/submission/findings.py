"""What can be found about a record folder: one table of rules, each with its severity and what to do."""

from dataclasses import dataclass

ERROR, WARNING, NOTE = "error", "warning", "note"

RULES = {
    "files.missing": (ERROR, "put the file into the folder"),
    "files.link": (ERROR, "put the file itself into the folder, so that its bytes are counted"),
    "json.unreadable": (ERROR, "write submission.json as one JSON table"),
    "json.fields": (ERROR, "add the field to submission.json"),
    "json.date": (ERROR, "give the day of the runs as YYYY-MM-DD"),
    "json.mean": (ERROR, "let submission.json give the mean over all its seeds"),
    "json.spread": (ERROR, "give the standard deviation over the seeds of the logs"),
    "json.record": (ERROR, "test against the record with the figures of the logs: epigram submit --record NATS does"),
    "log.missing": (ERROR, "add the log of each seed as train_seed<N>.log, as the script wrote it"),
    "log.score": (ERROR, "the run did not end with a score: run it again, report no older figure"),
    "log.figure": (ERROR, "the log is not as the run wrote it, or the run went wrong: run it again"),
    "log.seed": (ERROR, "put the log of each seed into the file that is named after it"),
    "log.copied": (ERROR, "run each seed: a copy is no sample"),
    "log.recipe": (ERROR, "make a record of runs by one recipe, with each log as its run wrote it"),
    "log.seeds": (ERROR, "give one log for each seed that submission.json lists, and list every seed that has a log"),
    "log.json": (ERROR, "take the figures of submission.json from the logs"),
    "log.readme": (ERROR, "take the figures of README.md from the logs"),
    "score.adapted": (NOTE, "read how it learns; epigram score MODEL --adapt KIND --probe tests ours on real text"),
    "score.unadapted": (WARNING, "let the log give the score without adaptation beside it, as final_quantized_sliding"),
    "size.cap": (ERROR, "pack the code, widen the quantizer's steps or shrink the model, and run that seed again"),
    "size.counted": (ERROR, "count the bytes of the files as they lie in the folder"),
    "size.extra": (
        WARNING,
        "take it out, or count it; a log is called train_seed<N>.log, an artifact as its log's seed",
    ),
    "size.artifact": (ERROR, "put the artifact into the folder that the log speaks of"),
    "size.unknown": (WARNING, "let the log say how many bytes the artifact takes, or add the artifact"),
    "time.train": (ERROR, "stop earlier: training, calibration and quantization together must fit"),
    "time.score": (ERROR, "score with a larger stride, or in one streaming pass"),
    "time.unknown": (WARNING, "let the log say how long it took"),
    "calibration.source": (ERROR, "calibrate on training text inside the training time, or on the model's own text"),
    "calibration.agree": (ERROR, "let log, artifact and submission.json name one calibration: that of the run"),
    "calibration.unknown": (WARNING, "let the log say what the quantizer was calibrated on"),
    "code.syntax": (ERROR, "train_gpt.py must be a Python script"),
    "code.hash": (ERROR, "give the SHA-256 of train_gpt.py as it lies in the folder"),
    "code.head": (ERROR, "make train_gpt.py again by epigram submit, and change the package instead of the script"),
    "code.recipe": (ERROR, "make train_gpt.py again by epigram submit, from the runs that the logs are of"),
    "code.foreign": (WARNING, "let epigram submit write train_gpt.py: nothing ties this one to the logs"),
    "code.requirements": (ERROR, "declare the library in requirements.txt"),
    "code.network": (WARNING, "scoring must work without a network: see whether this import can be reached then"),
    "code.process": (WARNING, "scoring is the script's own work: see whether this can be reached then"),
    "code.hidden": (WARNING, "ship source text: what is only made at run time cannot be read here"),
    "code.pickle": (WARNING, "load the artifact without pickle: torch.load can run what a file says"),
    "code.package": (NOTE, "read the differences: probes ran with the installed package, not with the script's"),
    "run.import": (ERROR, "the script must start in an empty folder with the declared libraries"),
    "run.train": (ERROR, "the script must train, pack and score in an empty folder"),
    "run.network": (ERROR, "take out what opens a connection"),
    "run.process": (ERROR, "take out what starts another program"),
    "run.data": (ERROR, "scoring may read the artifact and the validation shards, and nothing else of its own"),
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
