// The talk button: what the microphone hears goes to /v1/realtime, replies are played as they come.
(() => {
  const RATE = 24000 // Hz, both ways
  const PIECE = RATE / 10 // samples sent at once
  const TAP = `registerProcessor("tap", class extends AudioWorkletProcessor {
    process([[samples]]) {
      if (samples) this.port.postMessage(samples.slice())
      return true
    }
  })`
  let call = null

  const panel = () => document.querySelector("#talk")
  const say = words => { panel().querySelector("[role=status]").textContent = words }

  function pressed(on) {
    const button = panel().querySelector("button")
    button.setAttribute("aria-pressed", on)
    button.textContent = on ? "Stop talking" : "Talk"
  }

  /** What replies are to be made of: the boxes that are ticked, else speech. */
  function modalities() {
    const ticked = [...document.querySelectorAll("#kinds input:checked")]
    const names = ticked.map(one => one.closest("label").innerText.trim())
    return names.length ? names.map(name => (name === "speech" ? "audio" : name)) : ["audio"]
  }

  function toBase64(samples) {
    const bytes = new Uint8Array(Int16Array.from(samples, one => 32767 * Math.max(-1, Math.min(1, one))).buffer)
    return btoa(Array.from(bytes, one => String.fromCharCode(one)).join(""))
  }

  function fromBase64(text) {
    const bytes = Uint8Array.from(atob(text), one => one.charCodeAt(0))
    return Float32Array.from(new Int16Array(bytes.buffer), one => one / 32768)
  }

  /** Averages over the samples that fall on each one at RATE; what is left over waits for the next piece. */
  class Resampler {
    constructor(rate) {
      this.step = rate / RATE
      this.rest = []
    }

    push(samples) {
      const all = [...this.rest, ...samples]
      const made = []
      let start = 0
      for (; start + this.step <= all.length; start += this.step) {
        const part = all.slice(Math.floor(start), Math.max(Math.floor(start) + 1, Math.floor(start + this.step)))
        made.push(part.reduce((sum, one) => sum + one, 0) / part.length)
      }
      this.rest = all.slice(Math.round(start))
      return made
    }
  }

  class Call {
    async begin() {
      this.microphone = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } })
      this.context = new AudioContext()
      await this.context.audioWorklet.addModule(URL.createObjectURL(new Blob([TAP], { type: "text/javascript" })))
      if (call !== this) return this.end() // stopped while the browser asked for the microphone
      const address = new URL("v1/realtime", document.baseURI)
      address.protocol = address.protocol.replace("http", "ws")
      this.socket = new WebSocket(address)
      this.socket.onmessage = message => this.take(JSON.parse(message.data))
      this.socket.onclose = () => this.end("The connection has ended.")
      this.playing = new Set()
      this.free = 0 // when the last piece that plays will have ended
      this.heard = 0 // samples of the running reply
    }

    send(type, fields = {}) {
      if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify({ type, ...fields }))
    }

    listen() {
      this.send("session.update", {
        session: {
          type: "realtime",
          output_modalities: modalities(),
          audio: { input: { turn_detection: { type: "server_vad" } } },
        },
      })
      const tap = new AudioWorkletNode(this.context, "tap", { channelCount: 1, channelCountMode: "explicit" })
      const resampler = new Resampler(this.context.sampleRate)
      let waiting = []
      tap.port.onmessage = ({ data }) => {
        waiting.push(...resampler.push(data))
        if (waiting.length < PIECE) return
        this.send("input_audio_buffer.append", { audio: toBase64(waiting) })
        waiting = []
      }
      this.context.createMediaStreamSource(this.microphone).connect(tap)
      say("Speak: a pause ends your turn.")
    }

    take(event) {
      if (event.type === "session.created") this.listen()
      else if (event.type === "input_audio_buffer.speech_started") {
        this.hush()
        say("Listening …")
      } else if (event.type === "input_audio_buffer.speech_stopped") say("Thinking …")
      else if (event.type === "response.created") this.heard = 0
      else if (event.type === "response.output_audio.delta") this.play(fromBase64(event.delta))
      else if (event.type === "response.content_part.done") this.show(event.part)
      else if (event.type === "response.done") say("Your turn.")
      else if (event.type === "error") say(event.error.message)
    }

    play(samples) {
      say("Speaking …")
      this.heard += samples.length
      const buffer = this.context.createBuffer(1, samples.length, RATE)
      buffer.copyToChannel(samples, 0)
      const source = this.context.createBufferSource()
      source.buffer = buffer
      source.connect(this.context.destination)
      source.onended = () => this.playing.delete(source)
      this.playing.add(source)
      this.free = Math.max(this.context.currentTime, this.free)
      source.start(this.free)
      this.free += buffer.duration
    }

    /** Silence: somebody speaks. */
    hush() {
      this.playing.forEach(one => one.stop())
      this.free = 0
    }

    show(part) {
      const entry = document.createElement("li")
      const url = part.image_url?.url || part.video_url?.url
      if (url) {
        const picture = document.createElement("img")
        Object.assign(picture, { src: url, alt: part.type === "video_url" ? "video" : "image" })
        entry.append(picture)
      } else if (part.type === "output_audio") entry.textContent = `speech, ${(this.heard / RATE).toFixed(1)} s`
      else entry.textContent = part.text || part.dna || part.type
      panel().querySelector("ol").append(entry)
      entry.scrollIntoView({ block: "nearest" })
    }

    end(words = "") {
      if (call === this) call = null
      this.microphone?.getTracks().forEach(one => one.stop())
      if (this.context?.state !== "closed") this.context?.close()
      if (this.socket) {
        this.socket.onclose = null
        this.socket.close()
      }
      pressed(false)
      say(words)
    }
  }

  document.addEventListener("click", async ({ target }) => {
    if (!target.closest("#talk button")) return
    if (call) {
      call.end()
      return
    }
    const begun = (call = new Call())
    pressed(true)
    try {
      await begun.begin()
    } catch (error) {
      begun.end(`No microphone: ${error.message}`)
    }
  })
})()
