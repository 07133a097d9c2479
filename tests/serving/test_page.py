"""The chat page in a browser, beside a server that answers what the test says."""


def test_it_streams(page, server):
    page.type("Hello")
    page.press("Enter")
    server.say("Good ", "morn")
    page.wait("document.querySelector('.assistant .body').textContent === 'Good morn'")
    server.answer("ing")
    page.wait("!running")
