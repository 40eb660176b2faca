"""Privacy card, figures and the one-page report: what was promised, and what was measured."""

from dpjax.report.audit import audit_section as audit_section
from dpjax.report.card import CARD_VERSION as CARD_VERSION
from dpjax.report.card import build_card as build_card
from dpjax.report.federated_figures import partition_figure as partition_figure
from dpjax.report.figures import Curve as Curve
from dpjax.report.figures import epsilon_figure as epsilon_figure
from dpjax.report.figures import loss_figure as loss_figure
from dpjax.report.figures import roc_figure as roc_figure
from dpjax.report.files import card_schema as card_schema
from dpjax.report.files import read_card as read_card
from dpjax.report.files import validate_card as validate_card
from dpjax.report.files import write_card as write_card
from dpjax.report.inputs import CardInputs as CardInputs
from dpjax.report.page import Sample as Sample
from dpjax.report.page import TableData as TableData
from dpjax.report.page import report_html as report_html
from dpjax.report.page import write_report as write_report
