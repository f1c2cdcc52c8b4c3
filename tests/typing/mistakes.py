"""What a user's type checker has to refuse: every ignore here must be needed."""

from __future__ import annotations

from flask_natspubsub import NatsPubsub, PublishReceipt

pubsub = NatsPubsub()

pubsub.publish(1, {})  # type: ignore[call-overload]
pubsub.publish("a", {}).sequense  # type: ignore[attr-defined]  # noqa: B018
pubsub.publish(["a"], {}).sequence  # type: ignore[attr-defined]  # noqa: B018
receipt: PublishReceipt = pubsub.publish_nowait("a", {})  # type: ignore[assignment]
pubsub.run_worker("audit", concurrency="2")  # type: ignore[arg-type]
pubsub.shutdown("app")  # type: ignore[arg-type]
