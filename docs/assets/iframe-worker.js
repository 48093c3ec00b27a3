// A page that was opened from a folder may not start a worker, and the search of this theme runs in one.
// Here the worker's script runs in a hidden frame in its place: what it posts comes here, what is posted to it goes there.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    onmessage = null

    constructor(script) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = (data) => this.#receive(data)
      inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => load(inside, source)), Promise.resolve())
      this.ready = load(inside, script)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }

    #receive(data) {
      const event = new MessageEvent("message", { data })
      this.dispatchEvent(event)
      if (this.onmessage) this.onmessage(event)
    }
  }

  function load(frame, source) {
    return new Promise((resolve, reject) => {
      const script = frame.document.createElement("script")
      script.src = source
      script.onload = resolve
      script.onerror = reject
      frame.document.body.append(script)
    })
  }
}
