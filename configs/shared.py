"""What several configs share: data, schedules, and the published recipe per method.

`recipe(method)` gives the parts of a stage's loss as the method cards and the code
behind the published CIFAR-100 tables have them. It is data: change a copy in your own
config, or one value on the command line, e.g.
`--config.stages.student.method.dkd.beta=2.0`.
"""

from ml_collections import ConfigDict, config_dict

# The divergence weight of DKD that its authors chose for each pair.
DKD_BETA = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet32x4", "resnet8x4"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2_cifar"): 6.0,
}
CE = dict(ce=dict(weight=1.0))
SOFT_CE = dict(ce=dict(weight=0.1))

# Parts of the loss. Where `ce` is missing the method contains it, or uses no labels.
RECIPES = {
    "none": CE,
    # Logits.
    "kd": dict(**SOFT_CE, kd=dict(weight=0.9, temperature=4.0)),
    "kd_cross_entropy": dict(
        **SOFT_CE, kd_cross_entropy=dict(weight=0.9, temperature=4.0)
    ),
    "dkd": dict(**CE, dkd=dict(alpha=1.0, beta=8.0, temperature=4.0)),
    "nkd": dict(**CE, nkd=dict(gamma=3.5, temperature=3.0)),
    "dist": dict(**CE, dist=dict(temperature=4.0)),
    "wsld": dict(**CE, wsld=dict(temperature=4.0, alpha=2.25)),
    "lskd": dict(**SOFT_CE, logit_standardization=dict(temperature=2.0, factor=9.0)),
    "dkd_lskd": dict(
        **CE, logit_standardization=dict(base="dkd", temperature=2.0, factor=9.0)
    ),
    "mlld": dict(mlld=dict(variant="code")),
    "mlld_lskd": dict(mlld=dict(variant="code", standardize=True)),
    "function_matching": dict(function_matching=dict(temperature=1.0)),
    # Self-distillation.
    "uskd": dict(**CE, uskd=dict(alpha=0.1, beta=0.1, mu=0.1)),
    "pskd": dict(pskd=dict(alpha=0.8)),
    "tfkd_reg": dict(tfkd_reg=dict()),
    "tfkd_self": dict(tfkd_self=dict()),
    "byot": dict(byot=dict()),
    "dml": dict(dml=dict(students=2)),
    # Features.
    "fitnet": dict(**CE, fitnet=dict(factor=100.0)),
    "hint": dict(**CE, hint=dict(factor=1.0)),
    "at": dict(**CE, at=dict(factor=1000.0)),
    "nst": dict(**CE, nst=dict(factor=50.0)),
    "ft": dict(**CE, ft=dict(factor=200.0)),
    "vid": dict(**CE, vid=dict(factor=1.0)),
    "ofd": dict(**CE, ofd=dict(factor=1e-3)),
    "reviewkd": dict(**CE, reviewkd=dict(factor=5.0)),
    "kdsvd": dict(**CE, kdsvd=dict(factor=1.0)),
    "mgd_masked": dict(**CE, mgd_masked=dict(alpha=1.2e-3)),
    "srrl": dict(**CE, srrl=dict(alpha=1.0, beta=1.0)),
    "simkd": dict(simkd=dict(factor=2)),
    # Relations between examples.
    "sp": dict(**CE, sp=dict(factor=3000.0)),
    "cc": dict(**CE, cc=dict(factor=0.02)),
    "rkd": dict(**CE, rkd=dict(distance=25.0, angle=50.0)),
    "pkt": dict(**CE, pkt=dict(factor=30000.0)),
    "crd": dict(**CE, crd=dict(factor=0.8)),
    "crd_in_batch": dict(**CE, crd_in_batch=dict(factor=0.8)),
    # Several teachers.
    "averaged_teachers": dict(**SOFT_CE, averaged_teachers=dict(weight=0.9)),
    "ebkd": dict(**SOFT_CE, ebkd=dict(weight=0.9)),
    "camkd": dict(**CE, camkd=dict()),
    "meal": dict(meal=dict()),
    "meal_v2": dict(meal_v2=dict()),
    "fkd": dict(fkd=dict(labels="teacher")),
    # A first stage with the method alone, then the labels alone.
    "ab": dict(ab=dict(factor=0.003)),
    "fsp": dict(fsp=dict(factor=50.0)),
}
TWO_PHASES = ("ab", "fsp")
TWO_TEACHERS = ("averaged_teachers", "ebkd", "camkd", "meal", "meal_v2")
WITHOUT_TEACHER = ("none", "uskd", "pskd", "tfkd_reg", "byot", "dml")


def recipe(method: str, *, teacher: str = "", student: str = "") -> dict:
    """The parts of the student's loss for a method."""
    if method not in RECIPES:
        raise ValueError(
            f"no recipe for the method {method!r}; take one of {', '.join(RECIPES)}"
        )
    parts = {name: dict(options) for name, options in RECIPES[method].items()}
    for part in parts.values():
        if method == "dkd" and "beta" in part or part.get("base") == "dkd":
            part["beta"] = DKD_BETA.get((teacher, student), 8.0)
    return parts


def base(*, seed: int = 0, log_every: int = 20, evaluate_every: int = 1) -> ConfigDict:
    """What every config starts from."""
    config = ConfigDict()
    config.seed = seed
    config.precision = "float32"
    config.evaluation = dict(every_epochs=evaluate_every)
    config.log = dict(every_steps=log_every, tensorboard=False)
    config.mesh = dict(data=-1, fsdp=1)
    return config


def digits(batch_size: int = 64) -> ConfigDict:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels."""
    data = ConfigDict(dict(source="digits", path=config_dict.placeholder(str)))
    data.update(batch_size=batch_size, workers=0, on_error="raise")
    data.augment = dict(pad_crop=1)
    return data


def cifar100(batch_size: int = 64) -> ConfigDict:
    """CIFAR-100 with the usual augmentation; `path` names the python pickles."""
    data = ConfigDict(dict(source="cifar100", path=config_dict.placeholder(str)))
    data.update(batch_size=batch_size, workers=0, on_error="raise")
    data.augment = dict(
        flip="horizontal",
        pad_crop=4,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    )
    return data


def digits_optimizer(epochs: int) -> dict:
    """SGD for digits: 0.1 at batch 64, cosine."""
    return dict(
        name="sgd",
        learning_rate=0.1,
        schedule="cosine",
        momentum=0.9,
        weight_decay=5e-4,
        warmup_epochs=0.5 if epochs > 1 else 0.0,
        clip_norm=5.0,
    )


def cifar100_optimizer(
    batch_size: int, *, learning_rate: float = 0.05, epochs: int = 240
) -> dict:
    """The 240-epoch recipe: the rate is that of batch 64, scaled linearly."""
    return dict(
        name="sgd",
        learning_rate=learning_rate * batch_size / 64,
        schedule="multistep",
        milestones=tuple(epochs * part // 240 for part in (150, 180, 210)),
        factor=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )


def student_stages(
    method: str, *, teacher: str, student: str, optimizer: dict, epochs: int, first: int
) -> dict:
    """The stages of the student for a method.

    Args:
      method: a key of `RECIPES`.
      teacher: architecture of the teacher.
      student: architecture of the student.
      optimizer: of every stage.
      epochs: of the stage that ends with the student.
      first: epochs of the first stage of two-phase methods.
    """
    teachers = ("teacher",)
    if method in WITHOUT_TEACHER:
        teachers = ()
    elif method in TWO_TEACHERS:
        teachers = ("teacher", "assistant")
    parts = recipe(method, teacher=teacher, student=student)
    common = dict(optimizer=optimizer, epochs=epochs)
    if method == "tfkd_self":
        return {
            "copy": dict(method=dict(**CE), **common),
            "student": dict(method=parts, teachers=("copy",), **common),
        }
    if method == "dml":
        learners = ("student", "peer")
        return {"student": dict(method=parts, learner=learners, **common)}
    if method == "ft":
        parts["ft"]["warmup_epochs"] = min(first, epochs - 1)
    if method in TWO_PHASES:
        before = {k: v for k, v in optimizer.items() if k != "milestones"}
        before["schedule"] = "constant"
        return {
            "student_first": dict(
                method=parts,
                teachers=teachers,
                learner="student",
                optimizer=before,
                epochs=first,
            ),
            "student": dict(method=dict(**CE), **common),
        }
    return {"student": dict(method=parts, teachers=teachers, **common)}


def pair(
    config: ConfigDict,
    method: str,
    *,
    teacher: dict,
    student: dict,
    optimizer: dict,
    student_optimizer: dict | None = None,
    method_optimizer: dict | None = None,
    epochs: int,
    first: int,
    alone: bool = True,
) -> ConfigDict:
    """A teacher, the student alone, and the student taught by a method.

    `student_optimizer` is that of every student, `method_optimizer` that of the taught
    one, where they differ. All networks see the same augmentation, the teacher too.
    """
    student_optimizer = student_optimizer or optimizer
    stages = student_stages(
        method,
        teacher=teacher["name"],
        student=student["name"],
        optimizer=method_optimizer or student_optimizer,
        epochs=epochs,
        first=first,
    )
    # Networks that no stage trains are left out by the plan.
    networks = {"teacher": dict(teacher), "student": dict(student)}
    before = {}
    if any("teacher" in stage.get("teachers", ()) for stage in stages.values()):
        before["teacher"] = dict(method=dict(**CE), optimizer=optimizer, epochs=epochs)
    if method in TWO_TEACHERS:
        # A second teacher of the student's own kind.
        networks["assistant"] = dict(student)
        before["assistant"] = dict(
            method=dict(**CE), optimizer=student_optimizer, epochs=epochs
        )
    if alone and method != "none":
        networks["student_alone"] = dict(student)
        before["student_alone"] = dict(
            method=dict(**CE), optimizer=student_optimizer, epochs=epochs
        )
    for name in ("copy", "peer"):
        if method == {"copy": "tfkd_self", "peer": "dml"}[name]:
            networks[name] = dict(student)
    config.networks = networks
    config.stages = ConfigDict({**before, **stages})
    config.run = (*before, *stages)
    if method == "crd" and config.data.source == "digits":
        # The published number is larger than the whole set.
        config.stages.student.method.crd.negatives = 1024
    if method.startswith("mlld"):
        config.data.augment.strong = dict(ops=2, magnitude=10.0)
    if method == "function_matching":
        config.data.augment.mixup = 1.0
    return config


def variant(arg: str, file: str, *known: str) -> str:
    """The variant asked for, the first by default.

    Raises:
      ValueError: it is none of those known.
    """
    if not arg:
        return known[0]
    if arg not in known:
        raise ValueError(
            f"configs/{file} has no variant {arg!r}; take one of {', '.join(known)}"
        )
    return arg


def classification(kind: str, *, epochs: int) -> tuple[ConfigDict, dict, int]:
    """Config, optimiser and epochs for "digits", "smoke" (digits, briefly), "cifar100".

    Args:
      kind: which of them.
      epochs: of "digits"; the others have their own.
    """
    if kind == "cifar100":
        config = base(log_every=100, evaluate_every=10)
        config.data = cifar100()
        return config, cifar100_optimizer(64), 240
    config = base()
    config.notes = ("Handwritten digits of 8x8 pixels: a toy set, for trying things.",)
    config.data = digits()
    epochs = 1 if kind == "smoke" else epochs
    return config, digits_optimizer(epochs), epochs


def liver(*, smoke: bool) -> tuple[ConfigDict, dict, float]:
    """Config, optimiser and width factor for the shipped liver slices."""
    config = base()
    config.data = dict(
        source="liver_ct_sample",
        path=config_dict.placeholder(str),
        image_size=64 if smoke else 128,
        batch_size=8,
        workers=0,
        on_error="raise",
    )
    config.data.augment = dict(rotate=15.0, brightness=0.1, contrast=0.1)
    optimizer = dict(
        name="adam",
        learning_rate=3e-3,
        schedule="cosine",
        end_learning_rate=1e-6,
        granularity="epoch",
    )
    config.evaluation = dict(every_epochs=2, threshold=0.4, batch_size=8)
    config.notes = (
        "Liver in CT slices (MSD Task03 / LiTS, CC BY-SA 4.0), split by volume; "
        "about 160 training slices.",
    )
    return config, optimizer, 1 / 16 if smoke else 1 / 8


def stages(config: ConfigDict, **named: dict) -> ConfigDict:
    """Sets the stages, in this order."""
    config.stages = ConfigDict(named)
    config.run = tuple(named)
    return config


# Dense prediction: parts beside the task loss. The taps are those of the U-Net family;
# `resnet18_seg` and `unetpp` both have e1 to e5 and d5 to d2.
SEGMENTATION = {
    "none": {},
    "kd": dict(kd=dict(weight=1.0, temperature=1.0)),
    "cwd": dict(cwd=dict(factor=3.0)),
    "skd_pixel": dict(skd_pixel=dict(factor=10.0)),
    "skd_pair": dict(skd_pair=dict(factor=1.0)),
    "skd": dict(skd=dict()),
    "ifvd": dict(ifvd=dict(factor=200.0, student_tap="d2", teacher_tap="d3")),
    "cirkd": dict(cirkd=dict(student_tap="e4", teacher_tap="e5")),
    "dist": dict(dist=dict(temperature=1.0)),
    "mgd_masked": dict(
        mgd_masked=dict(
            mask_unit="pixels",
            lambda_mgd=0.75,
            alpha=2e-5,
            student_tap="e4",
            teacher_tap="e5",
        )
    ),
    "emkd": dict(emkd=dict()),
    "seg_at": dict(seg_at=dict()),
    "hlfd": dict(hlfd=dict(projection="learned")),
}


def segmentation_stage(method: str, *, optimizer: dict, epochs: int) -> dict:
    """The student's stage for a method of dense prediction, on medical images."""
    if method not in SEGMENTATION:
        raise ValueError(
            f"no recipe for the method {method!r}; take one of "
            f"{', '.join(SEGMENTATION)}"
        )
    parts = {name: dict(options) for name, options in SEGMENTATION[method].items()}
    return dict(
        method=dict(focal_dice=dict(weight=1.0), **parts),
        teachers=() if method == "none" else ("teacher",),
        optimizer=optimizer,
        epochs=epochs,
    )
