"""A grid of Flower in this process: messages go straight to the ClientApp of each node."""

from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.supercore.task_identity import TaskIdentity


class Grid:
    """Carries messages between a ServerApp and the ClientApps of some nodes.

    Args:
        app: the ClientApp.
        nodes: the settings of each node, by its id.
        troubles: what a node does instead of working, by its id and the number of the message to
            it: `"silent"`, an exception, or a function of its answer.
    """

    def __init__(self, app, nodes, troubles=None):
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
        self._app = app
        self._troubles = troubles or {}
        self.contexts = {
            number: Context(1, number, config, RecordDict(), {}) for number, config in nodes.items()
        }
        self.sent = []  # (node, content)

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        self._replies = {}
        for message in messages:
            number = message.metadata.dst_node_id
            count = sum(node == number for node, _ in self.sent)
            self.sent.append((number, message.content))
            trouble = self._troubles.get((number, count))
            name = f"{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self._replies[name] = None
            if trouble == "silent":
                continue
            try:
                if isinstance(trouble, Exception):
                    raise trouble
                reply = self._app(message, self.contexts[number])
                if trouble is not None:
                    reply = trouble(reply)
            except Exception as error:
                reply = Message(
                    Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message
                )
            self._replies[name] = reply
        return list(self._replies)

    def pull_messages(self, names):
        return [self._replies[name] for name in names if self._replies[name] is not None]
