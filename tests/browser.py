"""A page as a real browser shows it, Chromium in Qt's clothes: python tests/browser.py PAGE.html SHOT.png

Needs PyQt6-WebEngine. A program of its own, since an engine that fails ends its process.
"""

import os
import sys
from pathlib import Path

# Neither a screen, nor a GPU, nor the rights that a sandbox wants.
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
os.environ |= {"QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --no-sandbox"}

from PyQt6.QtCore import QTimer, QUrl  # noqa: E402
from PyQt6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PyQt6.QtWidgets import QApplication  # noqa: E402

page, shot = sys.argv[1:]
app, view = QApplication(sys.argv[:1]), QWebEngineView()
view.resize(1200, 2400)
# What is shown is a frame behind what is loaded.
view.loadFinished.connect(
    lambda loaded: QTimer.singleShot(1500, lambda: app.exit(not (loaded and view.grab().save(shot))))
)
view.load(QUrl.fromLocalFile(str(Path(page).absolute())))
view.show()
QTimer.singleShot(60_000, lambda: app.exit(1))
sys.exit(app.exec())
