/*
 * The search runs in a Web Worker. Browsers refuse workers for pages that are opened as files, so there the worker's
 * script runs in a hidden frame. The theme looks for the name IFrameWorker.
 */
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.body.appendChild(document.createElement("iframe"))
      frame.hidden = true
      const inside = frame.contentWindow
      inside.document.open() // else Firefox replaces the empty document after the script was added
      inside.document.write("<body>")
      inside.document.close()
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = new Promise((loaded) => {
        const script = inside.document.createElement("script")
        script.onload = () => loaded(inside)
        script.src = url
        inside.document.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
