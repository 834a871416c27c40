// A page that was opened as a file may not start workers. For that of the search an iframe stands in.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      const frame = document.body.appendChild(document.createElement("iframe"))
      frame.hidden = true
      this.inside = frame.contentWindow
      this.inside.document.write("<body></body>") // or Firefox would begin the document anew
      this.inside.document.close()
      this.inside.postMessage = (data) => pass(data, (event) => this.onmessage?.(event))
      const script = this.inside.document.createElement("script")
      script.src = url
      this.ready = new Promise((resolve) => (script.onload = resolve))
      script.onerror = (event) => this.onerror?.(event)
      this.inside.document.body.append(script)
    }

    postMessage(data) {
      this.ready.then(() => pass(data, (event) => this.inside.dispatchEvent(event)))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }

  // As between threads: later, and a copy.
  const pass = (data, to) => setTimeout(to, 0, new MessageEvent("message", { data: structuredClone(data) }))
}
