"""What every route of the operator API depends on: the hub, and who is asking."""

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import Depends
from fastapi.requests import Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from atoll.server import auth
from atoll.server.auth import Operator, Role
from atoll.server.context import HubContext
from atoll.server.errors import Unauthenticated

_bearer: Final = HTTPBearer(auto_error=False, description="The token in the hub's operator.json")


def hub_of(request: Request) -> HubContext:
    """Return the hub that the app belongs to."""
    hub: HubContext = request.app.state.hub
    return hub


Hub = Annotated[HubContext, Depends(hub_of)]


def caller(
    hub: Hub, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Operator:
    """Return whose bearer token the request shows; raise :class:`Unauthenticated`."""
    if shown is None:
        raise Unauthenticated(
            "this needs a bearer token", "send the token from the hub's operator.json"
        )
    with hub.store.read() as connection:
        return auth.authenticate(connection, shown.credentials)


def _with(role: Role) -> Callable[[Operator], Operator]:
    def check(operator: Annotated[Operator, Depends(caller)]) -> Operator:
        operator.require(role)
        return operator

    return check


Viewer = Annotated[Operator, Depends(_with("viewer"))]
Operating = Annotated[Operator, Depends(_with("operator"))]
Approver = Annotated[Operator, Depends(_with("approver"))]
Admin = Annotated[Operator, Depends(_with("admin"))]
