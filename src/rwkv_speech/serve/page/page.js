// The page: microphone and files to the server, text back. See talk.py for what goes over the websocket.

const at = (id) => document.getElementById(id);
const [mission, talk, hint, problem, level, hold, handsFree, file, undo, anew] =
  ["mission", "talk", "hint", "problem", "level", "hold", "hands-free", "file", "undo", "new"].map(at);

let key = "";
let missions = new Map(); // name -> kind
let socket = null; // the promise of one that is open
let microphone = null; // {context, source, recorder}
let sending = false;
let wanted = false; // somebody holds the button, or is hands-free
let heard = null; // the line of what is being said
let answer = null; // the line of what is being written
let voice = null; // {context, rate, until, playing}, once the server speaks its answers

function complain(text) {
  problem.textContent = text;
  problem.hidden = !text;
}

function line(kind) {
  hint.hidden = true;
  const found = document.createElement("li");
  found.className = kind;
  talk.append(found);
  return found;
}

function show(found, text, partial) {
  found.textContent = text;
  found.classList.toggle("partial", partial);
  found.scrollIntoView({ block: "end" });
}

const headers = () => (key ? { Authorization: `Bearer ${key}` } : {});

async function loadMissions() {
  const response = await fetch("v1/models", { headers: headers() });
  at("key-form").hidden = response.status !== 401;
  if (!response.ok) throw new Error((await response.json()).error.message);
  missions = new Map((await response.json()).data.map((model) => [model.id, model.mission]));
  mission.replaceChildren(...[...missions.keys()].map((name) => new Option(name, name)));
  const first = [...missions].find(([, kind]) => kind === "converse");
  if (first) mission.value = first[0];
  renew();
}

const converses = () => missions.get(mission.value) === "converse";
const spells = () => ["transcribe", "translate"].includes(missions.get(mission.value));

function connect() {
  if (socket) return socket;
  const mine = new Promise((resolve, reject) => {
    const protocols = ["rwkv-speech", ...(key ? [`openai-insecure-api-key.${key}`] : [])];
    const made = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`, protocols);
    made.binaryType = "arraybuffer";
    made.onopen = () => resolve(made);
    made.onmessage = ({ data }) => {
      if (socket === mine) data instanceof ArrayBuffer ? speak(data) : take(JSON.parse(data));
    };
    made.onclose = () => {
      if (socket === mine) {
        socket = null;
        stopSending();
      }
      reject(new Error("The server can't be reached."));
    };
  });
  return (socket = mine);
}

function take(event) {
  switch (event.type) {
    case "ready":
      undo.disabled = !event.can_undo;
      if (event.voice_rate) {
        voice ??= { context: new AudioContext(), rate: event.voice_rate, until: 0, playing: new Set() };
        microphone?.source.mediaStream.getAudioTracks()[0].applyConstraints({ echoCancellation: true });
      }
      break;
    case "undone":
      while (talk.lastElementChild && !talk.lastElementChild.matches(".answer")) talk.lastElementChild.remove();
      talk.lastElementChild?.remove();
      if (talk.lastElementChild?.matches(".heard")) talk.lastElementChild.remove();
      break;
    case "partial":
      heard ??= line("heard");
      show(heard, event.text, true);
      break;
    case "final":
      if (event.text) show(heard ?? line("heard"), event.text, false);
      else heard?.remove();
      heard = null;
      break;
    case "answer.delta":
      answer ??= line("answer");
      show(answer, answer.textContent + event.text, true);
      break;
    case "answer.done":
      show(answer ?? line("answer"), event.text || "(no answer)", false);
      answer = null;
      undo.disabled = !event.can_undo;
      break;
    case "error":
      complain(event.message);
      break;
    case "closed":
      if (event.reason) complain(`The session is over: ${event.reason}.`);
  }
}

// 16-bit samples of a spoken answer, behind what is being spoken.
function speak(data) {
  const samples = Float32Array.from(new Int16Array(data), (x) => x / 32768);
  const buffer = voice.context.createBuffer(1, samples.length, voice.rate);
  buffer.copyToChannel(samples, 0);
  const source = voice.context.createBufferSource();
  source.buffer = buffer;
  source.connect(voice.context.destination);
  source.onended = () => voice.playing.delete(source);
  voice.playing.add(source);
  voice.until = Math.max(voice.until, voice.context.currentTime);
  source.start(voice.until);
  voice.until += buffer.duration;
  voice.context.resume();
}

function hush() {
  for (const source of voice?.playing ?? []) source.stop();
  if (voice) voice.until = 0;
}

async function say(command) {
  (await connect()).send(JSON.stringify(command));
}

const start = (rate, free) => say({ type: "start", rate, mission: mission.value, hands_free: free });

async function openMicrophone() {
  if (microphone) return microphone;
  if (!isSecureContext)
    throw new Error("Browsers lend the microphone only to pages on localhost or HTTPS: open this one that way.");
  if (!navigator.mediaDevices) throw new Error("This browser has no microphone to lend.");
  let stream;
  try {
    const audio = { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: 1 };
    stream = await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    const why = {
      NotAllowedError: "The microphone was refused: allow it for this page, or upload a file.",
      NotFoundError: "There is no microphone: connect one, or upload a file.",
      NotReadableError: "The microphone is in use by another program.",
    };
    throw new Error(why[error.name] ?? `The microphone can't be used: ${error.message}`);
  }
  const context = new AudioContext();
  await context.audioWorklet.addModule("page/worklet.js");
  const source = context.createMediaStreamSource(stream);
  const recorder = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  recorder.port.onmessage = async ({ data }) => {
    if (!sending) return;
    let sum = 0;
    for (const x of new Int16Array(data)) sum += (x / 32768) ** 2;
    level.value = Math.min(1, Math.sqrt(sum / (data.byteLength / 2)) * 4);
    (await connect()).send(data);
  };
  microphone = { context, source, recorder };
  return microphone;
}

async function startSending(free) {
  hush();
  wanted = true;
  complain("");
  try {
    const { context, source, recorder } = await openMicrophone();
    await context.resume();
    await start(context.sampleRate, free);
    if (!wanted) return; // let go meanwhile
    sending = true;
    source.connect(recorder);
    hold.setAttribute("aria-pressed", "true");
  } catch (error) {
    complain(error.message);
    stopSending();
  }
}

function stopSending() {
  wanted = sending = false;
  microphone?.source.disconnect(); // before the end is said, or samples would come after it
  hold.setAttribute("aria-pressed", "false");
  handsFree.checked = false;
  level.value = 0;
}

async function endSending() {
  const was = sending;
  stopSending();
  if (was) await say({ type: "end" }).catch((error) => complain(error.message));
}

function renew() {
  stopSending();
  hush();
  talk.replaceChildren();
  heard = answer = null;
  hint.hidden = false;
  undo.disabled = true;
  undo.hidden = !converses();
  complain("");
  const old = socket;
  socket = null; // what still comes of it is not shown
  old?.then((open) => open.close()).catch(() => {}); // it never was open
}

async function upload(chosen) {
  complain("");
  if (spells()) return transcribe(chosen);
  const context = new AudioContext();
  try {
    const audio = await context.decodeAudioData(await chosen.arrayBuffer());
    const channels = Array.from({ length: audio.numberOfChannels }, (_, i) => audio.getChannelData(i));
    const mean = channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
    const samples = Int16Array.from(mean, (x) => Math.max(-1, Math.min(1, x)) * 32767);
    await start(audio.sampleRate, false);
    const open = await connect();
    for (let i = 0; i < samples.length; i += 32768) open.send(samples.slice(i, i + 32768));
    await say({ type: "end" });
  } catch (error) {
    complain(error.name === "EncodingError" ? `${chosen.name} can't be read as audio.` : error.message);
  } finally {
    context.close();
  }
}

async function transcribe(chosen) {
  const body = new FormData();
  for (const [name, value] of [["model", mission.value], ["stream", "true"], ["file", chosen]]) body.append(name, value);
  const response = await fetch("v1/audio/transcriptions", { method: "POST", body, headers: headers() });
  if (!response.ok) return complain((await response.json()).error.message);
  const found = line("heard");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n\n");
    rest = lines.pop();
    for (const event of lines.map((text) => JSON.parse(text.slice("data: ".length)))) {
      if (event.error) complain(event.error.message);
      else if (event.type.endsWith("delta")) show(found, found.textContent + event.delta, true);
      else show(found, event.text || "(no speech)", false);
    }
  }
}

hold.addEventListener("pointerdown", (event) => {
  hold.setPointerCapture(event.pointerId);
  if (!handsFree.checked) startSending(false);
});
for (const name of ["pointerup", "pointercancel"])
  hold.addEventListener(name, () => {
    if (!handsFree.checked) endSending();
  });

const typing = (target) => target.matches("input, select, button:not(#hold), label");
document.addEventListener("keydown", (event) => {
  const talks = event.key === " " || (event.key === "Enter" && event.target === hold);
  if (!talks || typing(event.target) || event.repeat || handsFree.checked) return;
  event.preventDefault();
  startSending(false);
});
document.addEventListener("keyup", (event) => {
  if ((event.key === " " || event.key === "Enter") && wanted && !handsFree.checked) endSending();
});
addEventListener("blur", () => {
  if (wanted && !handsFree.checked) endSending();
});

handsFree.addEventListener("change", () => (handsFree.checked ? startFree() : endSending()));
async function startFree() {
  await startSending(true);
  handsFree.checked = sending;
}

file.addEventListener("change", async () => {
  const [chosen] = file.files;
  file.value = "";
  if (chosen) await upload(chosen).catch((error) => complain(error.message));
});
undo.addEventListener("click", () => {
  undo.disabled = true; // until the server says that there is one more
  say({ type: "undo" }).catch((error) => complain(error.message));
});
anew.addEventListener("click", renew);
mission.addEventListener("change", renew);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  loadMissions().catch((error) => complain(error.message));
});
loadMissions().catch((error) => complain(error.message));
