// Search of pages that were opened from the disk: a browser starts no worker there, so the search runs in a hidden frame
// that answers as a worker would. The theme looks for `IFrameWorker` to find the scripts that its search loads.
if (location.protocol === "file:") {
  const load = (page, source) =>
    new Promise((resolve, reject) => {
      const script = page.createElement("script")
      Object.assign(script, { src: source, onload: resolve, onerror: reject })
      page.body.append(script)
    })

  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(source) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      // One after the other: a language needs the search itself.
      inside.importScripts = async (...sources) => {
        for (const one of sources) await load(inside.document, one)
      }
      this.ready = load(inside.document, source)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
