"""The hub's tables, as SQLAlchemy Core; created and migrated by Alembic (``migrations/``).

SQLite (WAL) when embedded, PostgreSQL by URL: types and constraints here keep to what both
have. Times are hub-clock Unix seconds (float). Bodies that only travel are stored as bytes or
JSON; what is asked about has a column.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

metadata = MetaData()

_Id = BigInteger().with_variant(Integer, "sqlite")

devices = Table(
    "devices",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("labels", JSON, nullable=False),
    Column("certificate", Text, nullable=False),
    Column("serial", String(64), nullable=False, unique=True),  # hex, as fleet.identity.Peer's
    # Renewed but not yet seen with its new certificate: the old one still counts.
    Column("previous_serial", String(64)),
    Column("expires_at", Float, nullable=False),
    Column("node_id", String(20), unique=True),  # Flower's uint64 does not fit a signed column
    Column("enrolled_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("online", Boolean, nullable=False, default=False),
    Column("boot", BigInteger, nullable=False, default=0),
    Column("last_seen", Float),
    Column("serve_url", String(255)),
    Column("agent_version", String(32)),
    Column("https_up", BigInteger, nullable=False, default=0),  # bytes from the device
    Column("https_down", BigInteger, nullable=False, default=0),
    Column("mqtt_up", BigInteger, nullable=False, default=0),
)

enrolment_tokens = Table(
    "enrolment_tokens",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),
    Column("device", String(63)),  # none: the device names itself
    Column("labels", JSON, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
    Column("used_by", String(63)),  # the device, so that it may ask again after a lost answer
)

# Flower nodes to unregister, of revoked devices and replaced keys: kept until it is done.
dropped_nodes = Table(
    "dropped_nodes",
    metadata,
    Column("node_id", String(20), primary_key=True),
    Column("device", String(63), nullable=False),
    Column("at", Float, nullable=False),
)

operators = Table(
    "operators",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("role", String(16), nullable=False),  # viewer, operator, approver, admin
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)

messages = Table(
    "messages",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("device", ForeignKey("devices.id"), nullable=False),
    Column("boot", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("device_at", Float, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("kind", String(16), nullable=False),  # the wire tag
    Column("body", LargeBinary, nullable=False),  # the encoded Envelope
    UniqueConstraint("device", "boot", "seq"),
    Index("messages_by_device_kind", "device", "kind", "id"),
)

twins = Table(
    "twins",
    metadata,
    Column("device", ForeignKey("devices.id"), primary_key=True),
    Column("desired_version", BigInteger, nullable=False, default=0),
    Column("desired", JSON, nullable=False),  # fleet.wire.Desired
    Column("published_version", BigInteger, nullable=False, default=0),
    Column("reported", JSON),  # fleet.wire.Reported
    Column("reported_at", Float),
)

windows = Table(
    "windows",
    metadata,
    Column("message", ForeignKey("messages.id"), primary_key=True),
    Column("device", ForeignKey("devices.id"), nullable=False),
    Column("model", String(63), nullable=False),
    Column("release", Integer, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("start", Float, nullable=False),
    Column("end", Float, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("counts", LargeBinary, nullable=False),  # MessagePack of Window.counts
    Column("noise", Float, nullable=False, server_default="0"),  # σ of the noise on each count
    Index("windows_by_release", "model", "release", "device", "received_at"),
)

health = Table(
    "health",
    metadata,
    Column("device", ForeignKey("devices.id"), primary_key=True),  # the latest alone
    Column("received_at", Float, nullable=False),
    Column("body", JSON, nullable=False),  # fleet.wire.Health
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("plan", Text, nullable=False),  # TOML as submitted
    Column("name", String(63), nullable=False),
    Column("model", String(63), nullable=False),
    # proposed (waits for approval), approved, running, gated (a candidate waits to be
    # published), rejected (a gate failed), published, failed, cancelled
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),  # why proposed, rejected or failed
    Column("created_at", Float, nullable=False),
    Column("created_by", String(63), nullable=False),
    Column("approved_by", String(63)),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("flower_run", String(20)),
    Column("attempt", Integer, nullable=False, server_default="0"),  # starts with Flower so far
    # How often it was taken up again since a round was completed.
    Column("stalled", Integer, nullable=False, server_default="0"),
    Column("stage", String(32), nullable=False, default=""),  # train, evaluate, export, …
    Column("metrics", JSON, nullable=False),  # accuracy by split and precision, gates, ε, δ
    Column("record", JSON),  # what its process told of itself (server.record); of old ones, none
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("survivors", JSON, nullable=False),
    Column("dropped", JSON, nullable=False),
    Column("loss", Float),  # mean training loss the devices reported
    Column("epsilon", Float),  # spent by the population so far; none when there is no noise
    # Of rounds from before they were stored, what follows is none.
    Column("bytes_up", BigInteger),  # payload of all devices together
    Column("bytes_down", BigInteger),
    Column("clip_norm", Float),  # that the round used
    Column("drawn", Integer),  # trainers in the round's cohort
    Column("connected", Integer),  # those of them that were there
    Column("lost", Boolean, nullable=False, server_default=false()),  # it broke off
    Column("accuracy", Float),  # of the weights after it, where devices were asked
    Column("evaluated", Integer),  # held-back examples that the accuracy is over
    Column("evaluate_seconds", Float),
)

# How far a run has been told to a tracking server: a mark of what was last told, so that it is
# told again once that changes. What is known there is looked up there.
exports = Table(
    "exports",
    metadata,
    Column("run", ForeignKey("runs.id"), primary_key=True),
    Column("target", String(255), primary_key=True),  # the server's URL, without credentials
    Column("mark", String(64), nullable=False),
    Column("at", Float, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("population", String(63), nullable=False),
    Column("charge", String(127), nullable=False),  # e.g. run and round: one charge each
    Column("event", JSON, nullable=False),  # privacy.ledger's event
    Column("at", Float, nullable=False),
    UniqueConstraint("population", "charge"),
)

releases = Table(
    "releases",
    metadata,
    Column("model", String(63), primary_key=True),
    Column("release", Integer, primary_key=True),
    Column("fallback", Integer),
    Column("run", ForeignKey("runs.id")),
    Column("manifest", JSON, nullable=False),  # fleet.bundle.Manifest
    Column("profile", LargeBinary, nullable=False),  # the bundle's reference profile
    Column("published_at", Float, nullable=False),
    Column("published_by", String(63), nullable=False),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("model", String(63), nullable=False),
    Column("release", Integer, nullable=False),
    # canary, rolling, done, halted, rolled-back, superseded
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("canaries", JSON, nullable=False),
    Column("targets", JSON, nullable=False),  # every device of the rollout
    Column("created_at", Float, nullable=False),
    Column("created_by", String(63), nullable=False),
    Column("updated_at", Float, nullable=False),
)

drift = Table(
    "drift",
    metadata,
    Column("device", ForeignKey("devices.id"), primary_key=True),  # the latest alone
    Column("model", String(63), primary_key=True),
    Column("release", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("state", String(16), nullable=False),  # too-few-rows, stable, drifted
    Column("rows", Integer, nullable=False),
    Column("score", Float, nullable=False),  # largest statistic over its threshold
    Column("detail", JSON, nullable=False),  # per variable: statistics, thresholds, verdict
)

alerts = Table(
    "alerts",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("kind", String(32), nullable=False),  # drift, rollout, device, …
    Column("severity", String(16), nullable=False),
    Column("device", String(63)),
    Column("model", String(63)),
    Column("text", Text, nullable=False),
    Column("acknowledged_at", Float),
    Column("acknowledged_by", String(63)),
    Column("closed_at", Float),
)

audit = Table(
    "audit",
    metadata,
    Column("index", _Id, primary_key=True, autoincrement=False),  # from 0, without gaps
    Column("entry", LargeBinary, nullable=False),  # canonical JSON; its RFC 6962 leaf is hashed
    Column("leaf", LargeBinary, nullable=False),
)

login_codes = Table(
    "login_codes",
    metadata,
    Column("code_sha256", String(64), primary_key=True),
    Column("operator", ForeignKey("operators.name"), nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),  # of the dashboard's cookie
    Column("operator", ForeignKey("operators.name"), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)
