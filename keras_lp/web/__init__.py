"""Web pages that run and train models in any browser, and the server of their rounds."""

from keras_lp.web.export import WebReport, export_web
from keras_lp.web.server import PhoneServer, phone_server

__all__ = ["PhoneServer", "WebReport", "export_web", "phone_server"]
